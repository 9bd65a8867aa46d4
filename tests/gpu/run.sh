#!/bin/bash
# Checks and benches on a GPU machine, in order of worth; each part goes on where another fails.
#   bash tests/gpu/run.sh 1|2 [OUT]     (README.md: what to carry; OUT: folder of the results)
cd "$(dirname "$0")/../.." || exit
OUT=${2:-${OUT:-gpu-results}}
PYTHON=${PYTHON:-python3}
case $1 in 1 | 2) mkdir -p "$OUT" ;; esac
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:${PYTHONPATH:-}
limited() { # SECONDS NAME COMMAND...
    local seconds=$1 name=$2
    shift 2
    echo "== $name, at most $seconds s"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
    echo "== $name: exit code ${PIPESTATUS[0]}"
}
case $1 in
1)
    limited 300 checks "$PYTHON" -m tests.gpu checks --out "$OUT/checks.json"
    limited 60 step "$PYTHON" -m tests.bench step --student SiT-XL/2 --cut activations --batch 64 \
        --plain false --rounds 3 --memory false --json
    limited 50 extract "$PYTHON" -m tests.bench extract --images 256 --rounds 2 --json
    ;;
2)
    TORCH_CUDA_SANITIZER=1 limited 60 races "$PYTHON" -m tests.gpu checks --budget 30 \
        --out "$OUT/races.json"
    limited 230 cifar10 "$PYTHON" jobs/experiments/matrix.py --source "${CIFAR:-cifar10.zip}" \
        --output "$OUT/cifar10" --config jobs/experiments/cifar10_short.yaml --select vanilla,haste --threads 8
    ;;
*)
    echo "usage: bash tests/gpu/run.sh 1|2 [OUT]" >&2
    exit 2
    ;;
esac
