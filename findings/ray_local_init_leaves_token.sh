#!/usr/bin/env bash
# Ray 2.60.0: a local ray.init() changes what later `ray start` commands of the same user require.
#
# Documented (https://docs.ray.io/en/latest/ray-security/token-auth.html): token authentication of a
# cluster is enabled by setting RAY_AUTH_MODE=token before it is started, and other ways of starting
# than ray.init() need a token that the user has generated first.
#
# Seen: with RAY_AUTH_MODE unset, ray.init("local") writes ~/.ray/auth_token and leaves it there after
# ray.shutdown(). From then on `ray start --head` requires that token, and `ray job submit` in the
# same home and environment does not send it:
#
#     RuntimeError: Authentication required: Unauthorized: Missing authentication token
#
# Without the file, the same two commands work. Exit code 0: as described; 1: it has changed.
set -euo pipefail

work=$(mktemp -d /tmp/finding.XXXXXX)
head_pid=
clean() {
    if [ -n "$head_pid" ]; then kill "$head_pid" && wait "$head_pid" || true; fi
    rm -rf "$work"
}
trap clean EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ray[default]==2.60.0"
export HOME=$work/home PATH=$work/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=$work
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS RAY_API_SERVER_ADDRESS
mkdir "$HOME"

free_port() {
    python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Submits a job to a new one-node cluster, started and used with Ray's defaults; its output to $1.
submit_to_new_cluster() {
    local dashboard
    dashboard=$(free_port)
    ray start --head --block --num-cpus=1 --port="$(free_port)" --dashboard-host=127.0.0.1 \
        --dashboard-port="$dashboard" --dashboard-agent-listen-port="$(free_port)" \
        >"$work/head.log" 2>&1 &
    head_pid=$!
    for _ in $(seq 120); do # the agent that starts jobs comes up after the dashboard
        if ray job submit --address "http://127.0.0.1:$dashboard" -- true >"$1" 2>&1; then break; fi
        if grep -q "Missing authentication token" "$1"; then break; fi
        sleep 1
    done
    kill "$head_pid"
    wait "$head_pid" || true
    head_pid=
}

submit_to_new_cluster "$work/before"
grep -q succeeded "$work/before" || { cat "$work/before"; echo "a new home does not work"; exit 1; }

python -c 'import ray; ray.init("local", num_cpus=1); ray.shutdown()' >"$work/init.log" 2>&1 ||
    { cat "$work/init.log"; exit 1; }
[ -s "$HOME/.ray/auth_token" ] || { echo "changed: ray.init() leaves no token"; exit 1; }

submit_to_new_cluster "$work/after"
if grep -q "Missing authentication token" "$work/after"; then
    echo "as described: ray.init() has left a token, and ray job submit is refused for want of it"
else
    cat "$work/after"
    echo "changed: ray job submit works, or fails in another way"
    exit 1
fi
