#!/usr/bin/env bash
# What one GPU does with this package, in at most eight minutes: `bash benchmarks/gpu.sh`.
# First the kernels against their references; a kernel that is wrong stops it. Then speeds, into
# benchmarks/results/gpu.json. DEVICE=cpu runs the same at a small size, with kernels interpreted.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ "${DEVICE:-cuda}" = cuda ]; then
  timeout 180 "$python" -m pytest -q -m gpu tests/crosscoder/test_triton.py
  timeout 300 "$python" benchmarks/gpu.py "$@"
else
  "$python" -m pytest -q -m slow tests/crosscoder/test_triton.py
  "$python" benchmarks/gpu.py --quick --device cpu "$@"
fi
