#!/bin/sh
# The GPU benchmark: one H200, under 8 minutes, no network. `run.sh --device cpu --small` only shows that it runs.
set -eu
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu/run.py "$@"
