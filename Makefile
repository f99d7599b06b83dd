PYTHON ?= python3
BIN := .venv/bin

.PHONY: distill test lint bench tables
distill: .venv/installed  ## set up .venv and run the main job on real text
	$(BIN)/fastkd distill

test: .venv/installed  ## the test suite, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/installed  ## the CPU benchmarks; then `make tables`
	$(BIN)/python -m pytest -q -c benchmarks/pytest.ini benchmarks/bench_*.py \
	  --benchmark-json=benchmarks/results/cpu.json --benchmark-columns=median,min,rounds

tables: .venv/installed  ## the README's tables from benchmarks/results
	$(BIN)/python benchmarks/table.py

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[triton,train,lora,dev]'
	touch $@
