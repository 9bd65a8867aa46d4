# Functions of extract.sbatch and train.sbatch: Ray on every node of a Slurm job, and a command beside
# it that is told when the job is about to end. Sourced by bash.
#
# Variables, all optional (sbatch hands them on):
#   HASTE_ROOT          the checkout, on a folder that all nodes see (default: where sbatch was called)
#   HASTE_VENV          a virtual environment on such a folder
#   HASTE_CONTAINER     words before every command instead, for instance
#                       "apptainer exec --nv --bind /scratch haste.sif"; they must exec the command,
#                       so that it gets the signals
#   HASTE_HEAD_IP       address of the first node (default: the first of `hostname -I`)
#   HASTE_WAIT_SECONDS  seconds until all nodes must have joined (default 600: a container is pulled)
#   HASTE_TMP           folder on each node's own disk, with a short name because paths of sockets are
#                       limited (default /tmp)
# Others reach every process too: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network between
# the nodes where a node has several.

set -u
: "${HASTE_ROOT:=$SLURM_SUBMIT_DIR}" "${HASTE_WAIT_SECONDS:=600}" "${HASTE_TMP:=/tmp}"
: "${HASTE_HEAD_IP:=$(hostname -I | cut -d' ' -f1)}"
[ -z "${HASTE_VENV:-}" ] || PATH=$HASTE_VENV/bin:$PATH
# without --cpus-per-task, all CPUs that the job has on a node
export SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
export PATH HASTE_ROOT HASTE_TMP HASTE_HEAD_IP PYTHONUNBUFFERED=1
export PYTHONPATH=$HASTE_ROOT${PYTHONPATH:+:$PYTHONPATH}
cd "$HASTE_ROOT" || exit 2

# Two jobs may share a node: ports of this job begin at a number of its own (20000 to 31990), all
# others are random; folders carry its number too. The token keeps other users of the network out.
HASTE_PORT=$((20000 + SLURM_JOB_ID % 1200 * 10))
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export HASTE_PORT RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS=$HASTE_HEAD_IP:$HASTE_PORT

# The number of an array's last task is that of the array: Slurm's commands take it for all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
: "${job:=$SLURM_JOB_ID}"

nodes=    # process of the srun that holds Ray's nodes
command=  # process that gets the signals
received= # a signal came since the last wait
again=    # the time is over: the job goes back to the queue

# Slurm sends TERM before it preempts a job, as does `scancel --signal=TERM --batch JOB`, and USR1
# before the time limit (#SBATCH --signal). With B: and --batch they reach this shell alone, so it
# hands them to the command as TERM, on which that writes a checkpoint and ends.
trap 'forward' TERM
trap 'again=yes; forward' USR1
forward() {
    received=yes
    if [ -n "$command" ]; then kill -TERM "$command"; else leave 143; fi
}

# Run words on every node, with all GPUs of the job: those that sbatch's --gpus-per-node names are not
# the job's where its user gave --gres too. After `sbatch --export=NAMES` variables would not reach it.
on_nodes() {
    exec env -u SLURM_GPUS_PER_NODE srun --overlap --export=ALL --nodes="$SLURM_NNODES" \
        --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@"
}

start_ray() {
    on_nodes --kill-on-bad-exit=1 bash "$HASTE_ROOT/docker/slurm/ray_node.sh" check &
    wait $! || {
        echo "a node cannot run Ray: see above" >&2
        leave 1
    }
    on_nodes bash "$HASTE_ROOT/docker/slurm/ray_node.sh" &
    nodes=$!
    timeout "$HASTE_WAIT_SECONDS" ${HASTE_CONTAINER:-} python - "$SLURM_NNODES" <<'PYTHON' &
import logging, sys, time
import ray

while not ray.is_initialized():
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except Exception:  # the first node is starting
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
print(f"Ray runs on {sys.argv[1]} nodes: {ray.cluster_resources()}", flush=True)
PYTHON
    local joined=$!
    if ! wait -n "$nodes" "$joined" || ! kill -0 "$nodes" 2>/dev/null; then
        kill "$joined" 2>/dev/null
        echo "Ray did not start on $SLURM_NNODES nodes in $HASTE_WAIT_SECONDS s: see above" >&2
        leave 1
    fi
}

# Run a command beside Ray. The exit code is the command's; 143: stopped, with a checkpoint.
run_command() {
    # shellcheck disable=SC2086 # the container's words are several
    ${HASTE_CONTAINER:-} "$@" &
    command=$!
    local code
    while received=; do
        code=0
        wait "$command" || code=$?
        [ -n "$received" ] || break # else the signal ended this wait, not the command
    done
    leave "$code"
}

# End Ray and the job, or send it back to the queue.
leave() {
    trap '' TERM USR1
    # Steps get TERM, not this shell; a signal to srun would kill them before they clean up.
    if [ -n "$nodes" ] && scancel --signal=TERM "$job"; then
        for ((i = 0; i < 90; i++)); do
            kill -0 "$nodes" 2>/dev/null || break
            sleep 0.5
        done
        kill -TERM "$nodes" 2>/dev/null
    fi
    if [ -n "$again" ] && [ "$1" != 0 ]; then
        echo "the time limit is near: job $job goes back to the queue and continues there"
        scontrol requeue "$job" && sleep 60 # Slurm ends this shell
    fi
    exit "$1"
}
