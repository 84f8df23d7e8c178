#!/usr/bin/env bash
# Style, types and tests:      bash scripts/test.sh
# One file, or a marker:       bash scripts/test.sh tests/test_slopes.py
# The tests that take minutes: bash scripts/test.sh -m slow
# With other people's tools:   bash scripts/test.sh --group tools
# In other engines:            bash scripts/test.sh --group engines/llama_cpp     (engines/onnx_runtime, engines/vllm)
set -euo pipefail
if [ "${1:-}" = --group ]; then
    # In an environment of its own; constraints.txt holds no tools.
    export GROUP=$2
    shift 2
    set -- "tests/$GROUP" "$@"
fi
. "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
mypy
# A process a core with one thread each: threads that wait for each other on a shared machine cost tenfold.
OMP_NUM_THREADS=1 exec python -m pytest --numprocesses auto --maxprocesses 4 "$@"
