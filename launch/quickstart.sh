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
    if [ -n "${GRASS_SHARE_CORES:-}" ]; then
        threads=$(($(nproc) / ranks))
        export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    fi
fi

config=(--deepspeed "$GRASS_ROOT/ds_configs/grass.json")
for argument in "$@"; do
    case "$argument" in --deepspeed | --deepspeed=*) config=() ;; esac
done

port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
# With the count given, the launcher does not look for GPUs or NUMA nodes; on a CPU it would find one node only.
exec deepspeed --num_accelerators "$ranks" --master_addr 127.0.0.1 --master_port "$port" \
    "$GRASS_ROOT/launch/train.py" ${config[@]+"${config[@]}"} "$@"
