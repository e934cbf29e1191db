# Everything runs in .venv, which is made on first use and again whenever pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT := The list of arguments is
TESTS := not slow and not interop and not gpu

.PHONY: demo test lint format clean setup

setup: $(STAMP)

# torch first and on its own: pip then takes the CPU build where it finds one, as its version orders after the plain one.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	mkdir -p .links
	ln -sfn .. .links/moec
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/moec export golden_models/olmoe-tiny --target onnx -o demo-out
	$(BIN)/moec run demo-out --prompt "$(PROMPT)" --max-new-tokens 40

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m '$(TESTS)'

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=.links $(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .links build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
