# Sourced by the .sbatch files: the environment of a job, and a start that survives time limits, preemption and lost machines.
# Settings are environment variables; give them before sbatch:  MODEL=my_model DATA=my.jsonl sbatch slurm/single_node.sbatch
#
#   CONFIG   DeepSpeed configuration (ds_configs/grass.json)      MODEL, DATA   as --model and --data of launch/train.py
#   ARGS     further options of launch/train.py, e.g. ARGS="--max_steps 2000 --save_strategy steps --save_steps 200"
#   OUTPUT   output folder on a file system that all machines share ($OUTPUT_ROOT/<job name>-<job id>, the same after a requeue;
#            OUTPUT_ROOT: runs)
#   RANKS    processes per machine (one per GPU that the job was given)
#   VENV     Python environment (.venv); VENV=none takes python from the PATH

VENV="${VENV:-.venv}"
if [ "$VENV" != none ]; then source "$VENV/bin/activate"; fi
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}" TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
RANKS="${RANKS:-${SLURM_GPUS_ON_NODE:-1}}"
OUTPUT="${OUTPUT:-${OUTPUT_ROOT:-runs}/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}"

# --resume_from_checkpoint true: from the newest complete checkpoint in $OUTPUT, or from the beginning if there is none.
TRAIN=(launch/train.py --deepspeed "${CONFIG:-ds_configs/grass.json}" --output_dir "$OUTPUT" --resume_from_checkpoint true --disable_tqdm true
    ${MODEL:+--model "$MODEL"} ${DATA:+--data "$DATA"} ${ARGS:-})

# SLURM sends USR1 to this shell before the time limit (--signal=B:USR1@...). srun hands it to every process of the step: each rank notes it,
# all of them save at the end of the step and exit with code 75. torchrun has to ignore it, or it would die of it.
TORCHRUN=(bash -c 'trap "" USR1; exec torchrun "$@"' torchrun)

run_and_requeue() {
    local step code asked=0
    trap 'asked=1; echo "time is up: saving"; kill -USR1 "$step"' USR1
    "$@" &
    step=$!
    code=0; wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends "wait" early, not the step
        code=0; wait "$step" || code=$?
    done
    # 75: saved, because it was asked to stop; 76: another machine fell silent. torchrun turns both into 1.
    if [ "$code" = 75 ] || [ "$code" = 76 ] || { [ "$code" != 0 ] && [ "$asked" = 1 ]; }; then
        echo "back to the queue (exit code $code, start ${SLURM_RESTART_COUNT:-0})"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
