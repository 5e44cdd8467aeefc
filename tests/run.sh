#!/usr/bin/env bash
# Set up (once), check style and types, run the tests.
#
#   bash tests/run.sh                        every promise once or more, in 15 minutes on two cores
#   bash tests/run.sh --all                  also what takes long, in 40: the SLURM cluster, more kills, combinations
#   bash tests/run.sh --edges                a short cycle with the oldest and the newest versions of other packages.
#                                            It takes 6 minutes after the downloads.
#                                            Arguments behind it go to tests/edges/run.py.
#   bash tests/run.sh -m "not dist"          only the quick tests; all arguments go to pytest
#   GRASS_TEST_MINUTES=60 bash tests/run.sh  another limit for the whole suite (30; with --all 75)
set -euo pipefail

# Twice the 15 minutes, and of --all the 40: a slow or shared machine must not turn a good suite into a failed one.
minutes=30
case " $* " in
    *" --all "*) minutes=75 ;;
esac

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/setup.sh
source "$ROOT/launch/setup.sh"
cd "$ROOT"

# No test needs the network; a hub name must fail at once.
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"

if [ "${1:-}" = --edges ]; then
    exec timeout --kill-after=30 "${GRASS_TEST_MINUTES:-$minutes}m" python tests/edges/run.py "${@:2}"
fi

# Otherwise the first test of it would take these minutes; where it cannot be built, tests are skipped.
if ! grass_has_gpu && [ -e /usr/include/libaio.h ]; then
    grass_build_op async_io AsyncIOBuilder || true
fi

ruff check .
ruff format --check .
mypy
PYTHONPATH="$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}" exec timeout --kill-after=30 "${GRASS_TEST_MINUTES:-$minutes}m" \
    python -m pytest -p tiers tests "$@"
