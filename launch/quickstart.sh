#!/usr/bin/env bash
# The whole thing in one command: set up, fine-tune SmolLM2-135M with GRASS on the built-in task, report.
#
#   bash launch/quickstart.sh                                   2 processes on the CPU, or one per GPU
#   bash launch/quickstart.sh --deepspeed ds_configs/lisa.json  further options go to launch/train.py
#   GRASS_RANKS=4 bash launch/quickstart.sh                     another number of processes
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    GRASS_SHARE_CORES=1
fi
# shellcheck source=launch/setup.sh
source "$HERE/setup.sh"

if grass_has_gpu; then
    ranks="${GRASS_RANKS:-$(nvidia-smi -L | grep -c GPU)}"
else
    ranks="${GRASS_RANKS:-2}"
fi
if [ -n "${GRASS_SHARE_CORES:-}" ]; then
    threads=$(($(env -u OMP_NUM_THREADS nproc) / ranks)) # which nproc would take for the number of cores
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# Few rows and steps, at a learning rate that fits them: two CPU cores take minutes. The user's options come later and win.
config=(--deepspeed "$GRASS_ROOT/ds_configs/quickstart.json")
small=(--max_steps 50 --per_device_train_batch_size 2 --learning_rate 6e-4 --eval_samples 32)
for argument in "$@"; do
    case "$argument" in --deepspeed | --deepspeed=*) config=() ;; esac
done

port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
grass_say "starting $ranks processes"
exec python "$GRASS_ROOT/launch/torchrun.py" --nproc-per-node "$ranks" --master-addr 127.0.0.1 --master-port "$port" \
    "$GRASS_ROOT/launch/train.py" ${config[@]+"${config[@]}"} ${small[@]+"${small[@]}"} "$@"
