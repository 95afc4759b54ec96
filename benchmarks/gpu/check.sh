#!/bin/sh
# Everything that a GPU must show, in one call of at most 8 minutes, with no network (benchmarks/README.md).
# It writes $OUT/gpu.json (OUT=benchmarks/out). `check.sh --device cpu --small` rehearses every part without a GPU.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
vendored=$PWD/benchmarks/gpu/vendored-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PYTHONPATH="$PWD/src:$PWD/benchmarks/cpu:$PWD/benchmarks/gpu:$vendored"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # of the size it has on these GPUs anyway; with it products repeat bit for bit
exec "$python" benchmarks/gpu/check.py "$@"
