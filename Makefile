PYTHON ?= python3
SHELL := bash
BIN := .venv/bin
# What this CPU has of the instruction sets that torch's kernels are compiled for.
CPUS := default $(shell grep -m1 -ow avx2 /proc/cpuinfo) $(if $(shell grep -m1 avx512vl /proc/cpuinfo),avx512)
TEST_CPUS := $(CPUS:%=test-cpu-%)
TEST_TORCHES := test-torch-lowest test-torch-newest

.PHONY: distill test test-cpus $(TEST_CPUS) $(TEST_TORCHES) lint bench tables docs
distill: .venv/installed  ## set up .venv and run the main job on real text
	$(BIN)/fastkd distill

test: .venv/installed  ## the test suite, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# The loss's tests on every kind of CPU, with one thread and two, and with the lowest and the newest
# torch that setup.py allows, each in a .venv of its own. `make -k test-cpus` goes on after a failure.
test-cpus: $(TEST_CPUS) $(TEST_TORCHES)

$(TEST_CPUS): test-cpu-%: .venv/installed
	for threads in 1 2; do ATEN_CPU_CAPABILITY=$* OMP_NUM_THREADS=$$threads \
	  $(BIN)/python -m pytest -q -n auto tests/loss || exit 1; done

$(TEST_TORCHES): test-torch-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n auto tests/loss

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/installed  ## the CPU benchmarks; then `make tables`
	$(BIN)/python -m pytest -q -c benchmarks/pytest.ini benchmarks/bench_{loss,head,topk}.py \
	  --benchmark-json=benchmarks/results/cpu.json --benchmark-columns=median,min,rounds
	$(BIN)/python -m pytest -q -c benchmarks/pytest.ini benchmarks/bench_trl.py \
	  --benchmark-json=benchmarks/results/trl.json --benchmark-columns=median,min,rounds

tables: .venv/installed  ## tables and picture of README and docs, from benchmarks/results
	$(BIN)/python benchmarks/table.py && $(BIN)/python benchmarks/picture.py

docs: .venv/installed  ## the pages of docs/, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[triton,train,lora,trl,docs,dev]'
	touch $@

.venv-%/installed: setup.py $(wildcard constraints-*.txt)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check \
	  $(addprefix -c ,$(wildcard constraints-$*.txt)) -e '.[triton,dev]'
	touch $@
