# Every target makes the virtual environment when it is missing. Needs Python 3.11 to 3.13 and a package index; no compiler.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
READY := $(VENV)/.ready

.PHONY: demo test test-all check docs bench clean

demo: $(READY)  ## a small benchmark on generated data, on the CPU, with its HTML report
	$(BIN)/cssbench demo --out demo

test: $(READY)  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/cssbench-example-method/cssbench_example_method

docs: $(READY)  ## the site: build/site/index.html; a warning is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs build/site
	@echo "build/site/index.html"

bench: $(READY)  ## all speed measurements: bench/results/<hardware>.csv and docs/speed.md; DEVICE=cuda on a GPU
	$(BIN)/python bench/all.py --device $(or $(DEVICE),cpu)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "cssbench needs Python 3.11, 3.12 or 3.13 on the PATH."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	UV_COMPILE_BYTECODE=1 $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[all]" \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	mkdir -p $(VENV)/mapped/cssbench
	ln -sfn "$(CURDIR)"/scenarios "$(CURDIR)"/baselines "$(CURDIR)"/reports $(VENV)/mapped/cssbench/
	touch $(READY)

clean:
	rm -rf $(VENV) demo build *.egg-info
