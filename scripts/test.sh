#!/usr/bin/env bash
# Style, types and tests:      bash scripts/test.sh
# One file, or a marker:       bash scripts/test.sh tests/test_slopes.py
# The tests that take minutes: bash scripts/test.sh -m slow
set -euo pipefail
. "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
