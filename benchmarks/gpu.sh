#!/usr/bin/env bash
# On a GPU machine, from a checkout alone, in 9 minutes: the tests on the GPU, then the benchmarks. JSON and logs go to FOLDER.
#   bash benchmarks/gpu.sh [FOLDER]
# Needs torch, triton, pytest, pytest-benchmark and hypothesis; uses liger-kernel, trl and pytest-xdist where present.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: no GPU is visible to torch")' || exit 1
parallel=$(python3 -c 'import xdist; print("-n 12")' 2>/dev/null)

# until_second SECOND COMMAND...: what runs then is interrupted (and saves what it has), so that the next ones keep their share.
until_second() {
  local left=$(($1 - SECONDS))
  timeout -s INT -k 10 $((left > 15 ? left : 15)) "${@:2}"
}

# bench SECOND NAME: benchmarks/bench_NAME.py, its JSON joined to gpu.json.
bench() {
  rm -f "$out/gpu-$2.json"
  until_second "$1" python3 -m pytest -q -c benchmarks/pytest.ini "benchmarks/bench_$2.py" \
    --benchmark-json="$out/gpu-$2.json" --benchmark-columns=median,min,rounds --benchmark-sort=name \
    2>&1 | tee "$out/gpu-bench-$2.log"
}

status=0
until_second 70 python3 -m pytest -q -x -m gpu tests/loss/test_gpu.py -k "every_plan or waiting" 2>&1 | tee "$out/gpu-first.log" || status=1
until_second 230 python3 -m pytest -q -m "" $parallel tests/loss/test_gpu.py tests/loss/test_loss.py tests/loss/test_api.py \
  tests/loss/test_sources.py tests/loss/test_rows.py tests/loss/test_topk_rows.py tests/loss/test_hidden.py 2>&1 | tee "$out/gpu-tests.log" || status=1
bench 345 loss || status=1
bench 475 head || status=1
bench 520 topk || status=1
python3 - "$out" <<'END' || status=1
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = [out / f"gpu-{name}.json" for name in ("loss", "head", "topk")]
saved = [json.loads(part.read_text()) for part in parts if part.exists() and part.stat().st_size]
if not saved:
    sys.exit("gpu.sh: no benchmark was saved")
whole = saved[0] | {"benchmarks": [b for result in saved for b in result["benchmarks"]]}
(out / "gpu.json").write_text(json.dumps(whole, indent=4))
for part in parts:
    part.unlink(missing_ok=True)
END
exit $status
