#!/usr/bin/env bash
# Make an environment of its own for each front-end, for the tests marked `front_ends`.
#
#   bash tests/front_ends/setup.sh                 all of them, 3 GB and some minutes
#   bash tests/front_ends/setup.sh trl ms_swift    these
#   GRASS_FRONT_ENDS=FOLDER                        where they are kept (.cache/front_ends in the project if left out)
#
# An environment sees the packages of the Python that runs this script (torch, DeepSpeed), and has what its front-end
# wants in other versions. A front-end itself is installed without its dependencies: those listed here are what training
# needs, those left out serve its web pages, its inference engines and its GPU kernels.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
FOLDER="${GRASS_FRONT_ENDS:-$ROOT/.cache/front_ends}"
[ "$#" -gt 0 ] || set -- trl llama_factory ms_swift axolotl

install() { # install NAME FRONT_END==VERSION DEPENDENCY...
    local python="$FOLDER/$1/bin/python" name="$1" front_end="$2"
    shift 2
    if [ -e "$FOLDER/$name/$front_end" ]; then
        return 0
    fi
    rm -rf "${FOLDER:?}/$name"
    python -m venv "$FOLDER/$name"
    python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
    # torch as it is: another release would bring gigabytes of CUDA libraries.
    python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$FOLDER/$name/torch.txt"
    # pip warns of the dependencies that are left out.
    if [ "$#" -gt 0 ]; then
        "$python" -m pip install --quiet --prefer-binary --constraint "$FOLDER/$name/torch.txt" "$@"
    fi
    "$python" -m pip install --quiet --no-deps "$front_end"
    touch "$FOLDER/$name/$front_end"
}

mkdir -p "$FOLDER"
for name in "$@"; do
    echo "front-end: $name"
    case "$name" in
        trl) install trl trl==1.16.0 ;;
        llama_factory)
            install llama_factory llamafactory==0.9.5 transformers==5.6.0 accelerate==1.11.0 trl==0.24.0 \
                datasets==4.0.0 peft==0.18.1 "av<=16" einops fastapi fire hf-transfer matplotlib modelscope omegaconf \
                pandas scipy sentencepiece sse-starlette tiktoken torchdata==0.11.0 "tyro<0.9" uvicorn
            # It imports torchaudio at the start, whose compiled part would need the CUDA libraries. Without that part it
            # imports.
            "$FOLDER/llama_factory/bin/python" -m pip install --quiet --no-deps torchaudio
            rm -f "$FOLDER"/llama_factory/lib/python*/site-packages/torchaudio/lib/_torchaudio*.so
            ;;
        ms_swift)
            install ms_swift ms_swift==4.6.0 "transformers<5.20" "trl<1.0" "datasets<4.8.5" "peft<0.21" accelerate addict \
                aiohttp attrdict binpacking cpm-kernels dacite einops fastapi importlib-metadata json-repair matplotlib \
                "modelscope>=1.23" nltk openai oss2 pandas pillow rouge scipy sentencepiece simplejson sortedcontainers \
                tensorboard tiktoken transformers-stream-generator uvicorn zstandard
            ;;
        axolotl)
            install axolotl axolotl==0.19.0 transformers==5.16.1 huggingface_hub==1.17.0 tokenizers==0.23.1 \
                accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 peft==0.20.0 hf_xet==1.4.3 pydantic==2.12.5 \
                optimum==1.16.2 evaluate==0.4.1 posthog==6.7.11 mistral-common==1.11.5 axolotl-contribs-lgpl==0.0.7 \
                axolotl-contribs-mit==0.0.6 addict art colorama einops fastcore fire immutabledict kernels langdetect \
                numba python-dotenv schedulefree scipy tensorboard typer wandb zstandard
            # It imports both, which needs no GPU.
            "$FOLDER/axolotl/bin/python" -m pip install --quiet --no-deps bitsandbytes==0.50.2 triton
            ;;
        *)
            echo "no front-end $name: there are trl, llama_factory, ms_swift and axolotl" >&2
            exit 2
            ;;
    esac
done
