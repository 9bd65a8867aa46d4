#!/usr/bin/env bash
# One Ray node of a Slurm job, which srun starts for ray_job.sh; it ends with the job.
set -u
folder=$HASTE_TMP/haste-$SLURM_JOB_ID-$SLURM_NODEID
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
# Slurm's GPUs are in CUDA_VISIBLE_DEVICES, where Ray counts them.
# shellcheck disable=SC2086 # the container's words are several
${HASTE_CONTAINER:-} ray start "${options[@]}" &
ray=$!
trap 'kill -TERM "$ray"; wait "$ray"' TERM INT # Ray ends its processes, in seconds
wait "$ray"
code=$?
rm -rf "$folder"
exit "$code"
