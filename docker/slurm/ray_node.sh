#!/usr/bin/env bash
# One Ray node of a Slurm job, which srun starts for ray_job.sh; it ends with the job. With the word
# `check`: can this node be one?
set -u
folder=$HASTE_TMP/haste-$SLURM_JOB_ID-$SLURM_NODEID
if [ "${1:-}" = check ]; then
    # shellcheck disable=SC2086 # the container's words are several
    ${HASTE_CONTAINER:-} python -c 'import ray, pipeline' || {
        echo "$SLURMD_NODENAME: no Ray or no checkout: HASTE_VENV (${HASTE_VENV:-none})," \
            "HASTE_CONTAINER and HASTE_ROOT ($HASTE_ROOT) must be on every node" >&2
        exit 1
    }
    mkdir -p "$folder" || exit 1 # it says why; HASTE_TMP names another place
    rmdir "$folder" 2>/dev/null
    # shellcheck disable=SC2086
    gpus=$(${HASTE_CONTAINER:-} nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    [ "$gpus" -ge "${SLURM_GPUS_ON_NODE:-0}" ] || echo "$SLURMD_NODENAME: Slurm gave" \
        "$SLURM_GPUS_ON_NODE GPUs, and nvidia-smi lists $gpus: a container needs --nv or the like" >&2
    exit 0
fi
options=(
    --block --disable-usage-stats --log-color=false
    --num-cpus="$SLURM_CPUS_PER_TASK" # Ray would take all CPUs of the machine
    --object-store-memory=$((1 << 30)) # Ray would take 30% of the memory; few objects pass here
    --dashboard-agent-listen-port=$((HASTE_PORT + 2 + SLURM_NODEID % 7))
    --temp-dir="$folder"
)
if [ "$SLURM_NODEID" = 0 ]; then
    # The dashboard runs any code that it receives: loopback only, through a tunnel.
    options+=(--head --node-ip-address="$HASTE_HEAD_IP" --port="$HASTE_PORT"
        --dashboard-host=127.0.0.1 --dashboard-port=$((HASTE_PORT + 1)) --ray-client-server-port=$((HASTE_PORT + 9)))
else
    options+=(--address="$RAY_ADDRESS")
fi
# When this ends, the command has ended: nothing is left that Ray must wait for, 30 s by default.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# Slurm's GPUs are in CUDA_VISIBLE_DEVICES, where Ray counts them.
# shellcheck disable=SC2086 # the container's words are several
${HASTE_CONTAINER:-} ray start "${options[@]}" &
ray=$!
trap 'kill -TERM "$ray" 2>/dev/null; wait "$ray"' TERM INT # Ray ends its processes, in seconds
wait "$ray"
code=$?
rm -rf "$folder"
exit "$code"
