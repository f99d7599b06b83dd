#!/usr/bin/env bash
# On a GPU machine, from a checkout alone: the tests on the GPU, then the benchmark. JSON and logs go to FOLDER.
#   bash benchmarks/gpu.sh [FOLDER]
# Needs torch, triton, pytest, pytest-benchmark and hypothesis; uses liger-kernel and pytest-xdist where present.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: no GPU is visible to torch")' || exit 1
parallel=$(python3 -c 'import xdist; print("-n 12")' 2>/dev/null)

status=0
timeout -s INT -k 10 80 python3 -m pytest -q -x -m gpu tests/test_gpu.py -k "every_plan or waiting" 2>&1 | tee "$out/gpu-first.log" || status=1
timeout -s INT -k 10 220 python3 -m pytest -q -m "" $parallel tests/test_gpu.py tests/test_loss.py tests/test_api.py \
  2>&1 | tee "$out/gpu-tests.log" || status=1
timeout -s INT -k 20 210 python3 -m pytest -q -c benchmarks/pytest.ini benchmarks/bench_loss.py \
  --benchmark-json="$out/gpu.json" --benchmark-columns=median,min,rounds --benchmark-sort=name \
  2>&1 | tee "$out/gpu-bench.log" || status=1
exit $status
