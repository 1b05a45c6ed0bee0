#!/usr/bin/env bash
# ./test.sh         install and run the test suite on the CPU
# ./test.sh --slow  also the tests that take long; further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
environment requirements.txt requirements-extra.txt requirements-test.txt

select=(-m "not slow")
if [ "${1:-}" = --slow ]; then select=(); shift; fi
"$python" -m ruff check .
OMP_NUM_THREADS=1 exec "$python" -m pytest ${select[@]+"${select[@]}"} "$@"
