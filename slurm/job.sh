# shellcheck shell=bash
# What the scripts of this folder have in common: they source it, prepare, and start their step through run_step.
#
# A stop: Slurm sends a signal before the time limit and at a preemption (--signal, USR1 unless you change it), and TERM at
# its end, to this script or to the step's tasks, as the site has it. Either way it becomes the file `stop` in the run
# folder; ranks see it at a step's edge, save, write outcome.json and exit. The job then starts again by itself.
# The exit status of the job is that of the run: 0 finished, 2 the input is wrong, 75 stopped and saved, else failed.

# Set by the script that sources this file; see there.
container=("${container[@]}")
inside=("${inside[@]}")
# Set by prepare.
run_dir=
outcome_before=
# shellcheck disable=SC2034  # read by the scripts
ranks_per_node=1
max_restarts=0
num_restarts=0
# Starts in a row that may end at the same step, before this job is not started again.
max_idle_starts=3
# What a step prints for us, quoted as Python's shlex does it, so that evaluating it runs nothing.
export_line="^export [A-Za-z_][A-Za-z0-9_]*=([A-Za-z0-9_@%+=:,./-]|'[^']*'|\"'\")*\$"

# Python with Shardline: yours, or the one that submitted the job, a virtual environment where it was submitted, or the
# first on PATH. In a container it is yours or the container's.
if [[ -z ${SHARDLINE_PYTHON:-} ]]; then
    SHARDLINE_PYTHON=python
    if ((${#inside[@]} == 0 && ${#container[@]} == 0)); then
        if [[ -n ${SHARDLINE_HOST_PYTHON:-} ]]; then
            SHARDLINE_PYTHON=$SHARDLINE_HOST_PYTHON
        elif [[ -x .venv/bin/python ]]; then
            SHARDLINE_PYTHON=$PWD/.venv/bin/python
        fi
    fi
fi
# Nothing is imported from the folder that the job starts in. The packages of a checkout lie beside its scripts.
export PYTHONSAFEPATH=1
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -e $checkout/pyproject.toml && -d $checkout/launcher && ":${PYTHONPATH:-}:" != *":$checkout:"* ]]; then
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
fi
# Steps of this job do not inherit CPUs per task from sbatch (Slurm 22.05 and later): each srun below says it again.
cpus_per_node=$SLURM_CPUS_ON_NODE
# The first step below is asked about the whole job, but srun tells each step of its own tasks alone.
export SHARDLINE_TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$SLURM_TASKS_PER_NODE}
# In an array, {task} in an argument is the number of the task: name=sweep-{task} seed={task}.
arguments=("${@//\{task\}/${SLURM_ARRAY_TASK_ID:-}}")
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # The job id of an array's last task is that of the array: requeueing it would requeue all of them.
    if [[ "$*" != *"{task}"* ]]; then
        echo "error: every task of array $SLURM_ARRAY_JOB_ID would train the same run; put {task} into its name:" \
            "sbatch --array=... SCRIPT CONFIG 'name=sweep-{task}'." >&2
        exit 2
    fi
fi

stop_signal=
on_signal() {
    stop_signal=${stop_signal:-$1}
    echo "job $job: SIG$1 to the batch script; the run saves and stops"
}
trap 'on_signal USR1' USR1
trap 'on_signal USR2' USR2
trap 'on_signal TERM' TERM

# Waits for a child through signals, which end a bare `wait`; with a run folder, asks the run to stop after one. Again and
# again, for an attempt that is only beginning removes the file that it finds.
see_through() {
    local pid=$1 folder=${2:-} status=0 pause
    while kill -0 "$pid" 2> /dev/null; do
        if [[ -n $stop_signal && -d $folder && ! -e $folder/stop ]] && ! has_new_outcome; then
            echo "signal SIG$stop_signal to the batch script" > "$folder/stop" || true
        fi
        sleep 0.5 &
        pause=$!
        wait -n "$pid" "$pause" || true
    done
    wait "$pid" || status=$?
    return "$status"
}

# Which outcome.json there is: each is a new file, so that one of an earlier attempt is not taken for ours.
outcome_id() {
    stat -c '%i %.9Y' "$run_dir/outcome.json" 2> /dev/null || true
}

# Whether the step has said how it ended. The outcome of an earlier attempt is there until this one begins, then none.
has_new_outcome() {
    local id
    id=$(outcome_id)
    [[ -n $id && $id != "$outcome_before" ]]
}

outcome_field() {
    sed -n "s/.*\"$1\": \"\{0,1\}\([^\",}]*\).*/\1/p" "$run_dir/outcome.json"
}

# first_node MODULE ARGUMENT ...: runs a module there, and takes over the variables that it prints. Other lines, such as a
# container's greeting, are passed on.
first_node() {
    local output line pid status=0
    output=$(mktemp)
    srun --nodes=1 --relative=0 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus_per_node" \
        "${container[@]}" "${inside[@]}" "$SHARDLINE_PYTHON" -m "$@" > "$output" &
    pid=$!
    see_through "$pid" "$run_dir" || status=$?
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ $status == 0 && $line =~ $export_line ]]; then
            eval "$line"
        else
            printf '%s\n' "$line"
        fi
    done < "$output"
    rm -f "$output"
    return "$status"
}

# prepare torchrun|deepspeed|srun: checks configuration and allocation for that way to start ranks, prepares the corpus,
# and sets run_dir, ranks_per_node and the ranks' environment.
prepare() {
    first_node launcher.slurm.job "$@" "${arguments[@]}" || exit "$?"
    # A copy of this start's own: a file that is edited while the job runs would reach some ranks and not others.
    # shellcheck disable=SC2154  # job's output sets it
    arguments=("$config_file")
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 && -z ${SHARDLINE_IS_SUCCESSOR:-} ]]; then
        rm -f "$run_dir/requeues"
    fi
}

# run_step N COMMAND ...: runs the step with N tasks on each node, again after a failure where faults.max_restarts has it,
# and ends the job with the exit status of the run.
run_step() {
    local tasks_per_node=$1 pid status exit_code
    shift
    while true; do
        status=0
        outcome_before=$(outcome_id)
        # Counts go before --ntasks-per-node of sbatch only where both are given. The first task that fails ends the
        # others, and nothing waits for tasks that cannot come.
        srun --ntasks="$((SLURM_NNODES * tasks_per_node))" --ntasks-per-node="$tasks_per_node" \
            --cpus-per-task="$((cpus_per_node / tasks_per_node))" --kill-on-bad-exit=1 \
            "${container[@]}" "${inside[@]}" "$@" &
        pid=$!
        see_through "$pid" "$run_dir" || status=$?
        if ! has_new_outcome; then
            if ((status == 0)); then status=1; fi
            echo "job $job: the step ended with status $status, and no rank could say how the run ended" >&2
            exit "$status"
        fi
        exit_code=$(outcome_field exit_code)
        echo "job $job: $(outcome_field status) at step $(outcome_field step): $(outcome_field reason)"
        if [[ $exit_code == 1 ]]; then
            start_again_without_bad_nodes
            if may_restart_step; then
                continue
            fi
            exit_code=$(outcome_field exit_code)
        fi
        if [[ $exit_code == 75 ]]; then
            start_again_if_signalled
        fi
        exit "$exit_code"
    done
}

# Waits out the back-off; false where all restarts were used, the failure comes again and again, or a stop was asked for.
may_restart_step() {
    local status=0
    if ((max_restarts == 0)) || [[ -n $stop_signal ]]; then
        return 1
    fi
    outcome_before=$(outcome_id)
    first_node launcher.slurm.restart "$num_restarts" "${arguments[@]}" || status=$?
    num_restarts=$((num_restarts + 1))
    return "$status"
}

# Not after `touch RUN/stop`, which is a person's wish, nor after scancel. Where Slurm itself requeues (a preemption, a
# requeue by hand), the job is no longer running by then, and there is nothing to do.
start_again_if_signalled() {
    if [[ -z $stop_signal && ! $(outcome_field reason) =~ SIG(TERM|USR1|USR2) ]]; then
        return
    fi
    if makes_progress; then
        start_again
    fi
}

# Whether another start is worth it. Without, a job whose time is too short for one step would be requeued for ever.
makes_progress() {
    local step num_idle
    step=$(outcome_field step)
    echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} $step" >> "$run_dir/requeues" || return 0
    num_idle=$(tail -n "$max_idle_starts" "$run_dir/requeues" | grep -c " $step\$")
    if ((num_idle < max_idle_starts)); then
        return 0
    fi
    rm -f "$run_dir/requeues"
    echo "job $job: not started again: $max_idle_starts starts in a row ended at step $step, so that another would come" \
        "to nothing too; give it more time (--time), or a later warning (--signal), and submit it again to continue" >&2
    return 1
}

# launch.preflight wrote down which nodes' own check failed. Each time the list of nodes to leave out grows, so that this
# ends: with healthy nodes, or with a job that waits for more nodes than are left.
start_again_without_bad_nodes() {
    local bad excluded=
    if [[ ! -e $run_dir/bad_nodes ]]; then
        return
    fi
    bad=$(sed -n "s/^$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} \\([^ ]*\\).*/\\1/p" "$run_dir/bad_nodes" | sort -u | paste -sd,)
    if [[ -n $bad ]]; then
        excluded=$(scontrol show job --oneliner "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        echo "job $job: starting again without $bad, whose own check failed"
        start_again "${excluded/(null)/}${excluded:+,}$bad"
    fi
}

# start_again [NODES]: requeues this job, or submits its successor; without these nodes.
start_again() {
    local excluded=${1:-} state
    excluded=${excluded#,}
    state=$(scontrol show job --oneliner "$job" | sed -n 's/.* JobState=\([A-Z]*\) Reason=\([^ ]*\).*/\1 \2/p')
    # Slurm ends a job whose time is up for good, also where it was late with its warning.
    if [[ $state != "RUNNING "* && $state != *" TimeLimit" ]]; then
        echo "job $job: Slurm is ending this job, so that starting it again is left to Slurm"
        return
    fi
    trap '' TERM USR1 USR2
    # Slurm takes a list of nodes to leave out from a job that waits, and it must not begin before.
    if [[ -n $excluded ]] && scontrol requeuehold "$job"; then
        scontrol update JobId="$job" ExcNodeList="$excluded"
        scontrol release "$job"
        echo "job $job: requeued"
        sleep 60
    elif [[ -z $excluded ]] && scontrol requeue "$job"; then
        echo "job $job: requeued"
        # Slurm ends this script.
        sleep 60
    elif [[ -n ${SHARDLINE_RESUBMIT:-} ]]; then
        echo "job $job: this cluster forbids to requeue it; submitting another in its place"
        SHARDLINE_IS_SUCCESSOR=1 bash "$SHARDLINE_RESUBMIT" "--dependency=afterany:$SLURM_JOB_ID" ${excluded:+"--exclude=$excluded"}
    else
        echo "job $job: this cluster forbids to requeue it; submit it again to continue" >&2
    fi
}
