# What speaks to Slurm: signals, srun, GPUs, the tasks of an array, and queueing up again.
# Sourced by job.sh; uses its say, fail, repo, scripts, venv, datasets, output_dir, pictures_dir, outputs, samples, phase and
# read_status.
# shellcheck shell=bash disable=SC2034,SC2154

child=''                  # the process that step waits for
signalled='' called_off=''    # a signal came: while waiting for `child`; at any time
processes=1               # that training is to have
srun=()                   # what starts training on all nodes
seed=''                   # of a task of an array

# Whether this is a batch script: not in an interactive allocation or a step of one, where nothing is queued again.
in_batch() { [[ -n "${SLURM_JOB_ID-}" ]] && grep -aqsF ".batch]" "/proc/$PPID/cmdline"; }

# Only USR1 is trapped: with CONT, which Slurm sends too, bash often loses the USR1.
listen_to_slurm() {
    [[ -z "${SLURM_HET_SIZE-}" ]] || fail 2 'a heterogeneous job cannot be used; ask for nodes that are all alike'
    ! in_batch || trap call_off USR1
}

# Slurm sends USR1 some minutes before the time limit (#SBATCH --signal).
call_off() {
    signalled=1
    called_off=1
    [[ -z "$child" ]] || kill -USR1 "$child" 2>/dev/null || true
}

# Runs a command in the background: a shell that waits hears signals, one with a command in the foreground does not.
attend() {
    local code
    "$@" &
    child=$!
    [[ -z "$called_off" ]] || kill -USR1 "$child" 2>/dev/null || true
    while :; do
        signalled=''
        code=0
        wait "$child" || code=$?
        [[ -n "$signalled" ]] || break # otherwise the signal ended the wait, not the command
    done
    child=''
    return "$code"
}

# Checks the GPUs, and sets all that a batch job has and a plain shell has not.
prepare_batch() {
    local nodes="${SLURM_JOB_NUM_NODES:-1}" per_node="${SLURM_GPUS_ON_NODE:-0}" cpus="${SLURM_CPUS_PER_TASK:-1}"
    local restart="${SLURM_RESTART_COUNT:-0}" on_cpu="${ACCELERATE_USE_CPU-}"
    ((restart == 0)) || say "== restart $restart of job $SLURM_JOB_ID; before: $(head -qn 1 "$(state_file)" \
        2>/dev/null || echo 'ended without a word, as when a node dies')"
    if [[ "${on_cpu,,}" =~ ^(1|true|yes|on|y|t)$ ]]; then
        per_node=1
    elif ((per_node > 0)); then
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL \
            "$venv/bin/python" "$scripts/slurm/environment.py" gpus "$per_node"
    fi
    ((per_node > 0)) || per_node=1
    processes=$((nodes * per_node))
    cpus=$((cpus / per_node > 0 ? cpus / per_node : 1)) # srun does not inherit it
    srun=(srun "--nodes=$nodes" "--ntasks=$processes" "--ntasks-per-node=$per_node" "--cpus-per-task=$cpus"
        --export=ALL --kill-on-bad-exit=1)
    if ((processes > 1)); then
        MASTER_ADDR="$(scontrol -o show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
        MASTER_PORT=$((20000 + (SLURM_JOB_ID * 13 + restart * 101) % 20000)) # of this start alone
        export MASTER_ADDR MASTER_PORT
        # shellcheck disable=SC2016 # each task has its own values
        srun+=(bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            exec "$0" "$@"')
    fi
    if [[ -n "${SLURM_ARRAY_TASK_ID-}" ]]; then # each task of an array has its own seed and folders
        seed="$SLURM_ARRAY_TASK_ID"
        output_dir="${OUTPUT_DIR:+$OUTPUT_DIR-$seed}"
        pictures_dir="${pictures_dir:-$samples}/task-$seed"
    fi
    go_offline
}

# The processes were one run: started wrongly, each would train by itself without a word.
check_processes() {
    ! in_batch || [[ "$1" == "$processes" ]] ||
        fail 1 "$processes processes were started, and training says that it ran on $1"
}

# Where the job notes how far it came when it is queued up again: a sentence, all that shows progress, a count.
state_file() { echo "$outputs/.job_$SLURM_JOB_ID"; }

forget_restarts() { ! in_batch || rm -f "$(state_file)"; }

# Queues the same job up again, unless the last three starts got no further.
requeue() {
    local where progress times=1 state restart="${SLURM_RESTART_COUNT:-0}"
    # By the array's number all of its tasks would be requeued, and the last task's own number is the array's.
    local job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    read_status
    where="in $phase.py"
    [[ "$run_state" != stopped ]] || where="after step $steps_done of $steps"
    # What captioning, encoding and inference have done is in files.
    progress="$where, $(find "$outputs" ${output_dir:+"$output_dir"} "${datasets[@]}" \
        "${pictures_dir:-$samples}" -type f ! -name '.job_*' 2>/dev/null | wc -l || true) files"
    state="$(state_file)"
    if [[ -f "$state" && "$(sed -n 2p "$state")" == "$progress" ]]; then
        times=$(($(tail -n 1 "$state") + 1))
    fi
    ((times <= 3)) || fail 1 "three restarts in a row ended $where: a longer --time is needed"
    { mkdir -p "$outputs" && printf '%s\n%s\n%s\n' "$where" "$progress" "$times" >"$state"; } ||
        say "this restart is not counted: $state cannot be written"
    say "== $(date '+%F %T') requeued as restart $((restart + 1)) of job $job, $where"
    scontrol requeue "$job" || fail 1 "job $job cannot be requeued; sbatch job.sh goes on from there"
    sleep 600 # until Slurm ends this shell
}
