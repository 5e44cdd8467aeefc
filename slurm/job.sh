# Sourced by the .sbatch files: the environment of a job, and a start that survives time limits, preemption and lost
# machines. Settings are environment variables before sbatch:  MODEL=my_model DATA=my.jsonl sbatch slurm/single_node.sbatch
#
#   METHOD   as --method of launch/train.py: METHOD=lora sbatch slurm/single_node.sbatch
#   CONFIG   DeepSpeed configuration (that of METHOD, without METHOD ds_configs/grass.json)
#   MODEL, DATA   as --model and --data of launch/train.py
#   ARGS     further options of launch/train.py without spaces in their values: ARGS="--max_steps 2000 --seed 3"
#   OUTPUT   output folder on a file system that all machines share (runs/<job name>-<job id>, the same after a requeue)
#   RANKS    processes per machine (one per GPU that the job was given; without GPUs one per task)
#   VENV     Python environment (.venv); VENV=none takes python from the PATH
#   MAX_RESTARTS   how often the job goes back to the queue by itself (100)

# SLURM sends USR1 to this shell before the time limit (--signal=B:USR1@...), and srun hands it to its tasks. The ranks
# save at the end of the step and exit with 75; they exit with 76 when another machine fell silent.
asked=0 step=
trap 'asked=1; echo "time is up: saving"; [ -z "$step" ] || kill -USR1 "$step"' USR1

VENV="${VENV:-.venv}"
if [ "$VENV" != none ]; then
    source "$VENV/bin/activate" || {
        echo "VENV=$VENV: no such environment in $PWD (bash launch/setup.sh makes .venv)" >&2
        exit 1
    }
fi
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}" TOKENIZERS_PARALLELISM=false
# More threads help on CPU ranks only; the other CPUs of a task are for loading data and writing checkpoints. srun does
# not take the number of CPUs from the job.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
RANKS="${RANKS:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}"
OUTPUT="${OUTPUT:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}"

# Resume from the newest complete checkpoint in $OUTPUT, or start if there is none.
[ -n "${METHOD:-}" ] || CONFIG="${CONFIG:-ds_configs/grass.json}"
read -ra more <<<"${ARGS:-}"
TRAIN=(launch/train.py ${METHOD:+--method "$METHOD"} ${CONFIG:+--deepspeed "$CONFIG"} --output_dir "$OUTPUT"
    --resume_from_checkpoint true --disable_tqdm true ${MODEL:+--model "$MODEL"} ${DATA:+--data "$DATA"} "${more[@]}")
# One process per GPU, each a task of SLURM. Whichever fails, the others are ended.
SRUN=(srun --kill-on-bad-exit=1 --ntasks="$((SLURM_NNODES * RANKS))" --ntasks-per-node="$RANKS")

newest_checkpoint() { ls -d "$OUTPUT"/checkpoint-* 2>/dev/null | sort -V | tail -n 1; }

# Start the ranks; go back to the queue when they have saved or lost a machine, or when the signal came before Python
# could handle it (138).
run_and_requeue() {
    local code=138 before
    before="$(newest_checkpoint)"
    if [ "$asked" = 0 ]; then
        "$@" &
        step=$!
        code=0; wait "$step" || code=$?
        while kill -0 "$step" 2>/dev/null; do # a signal ends "wait" early, not the step
            code=0; wait "$step" || code=$?
        done
    fi
    case "$code" in
        0) exit 0 ;;
        75 | 76 | 138) ;;
        *) # a crash: only if it saved before, or it would go on for ever
            if [ "$asked" = 0 ] || [ "$(newest_checkpoint)" = "$before" ]; then exit "$code"; fi ;;
    esac
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "exit code $code, and not queued again after ${SLURM_RESTART_COUNT:-0} restarts (MAX_RESTARTS)"
        exit "$code"
    fi
    echo "back to the queue (exit code $code, restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    # In an array the plain number may mean all its tasks.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    exit "$code"
}
