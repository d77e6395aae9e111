# `make demo` and `make test` work on a fresh machine; each makes .venv if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

# What decides whether the installed environment is still the right one.
BUILD_FILES := pyproject.toml setup.py constraints.txt

.PHONY: demo test slow package lint format types clean

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/random_checkpoint.py .demo/checkpoint --preset tiny --text-encoder --force
	$(BIN)/hart-infer generate "a cat" --model .demo/checkpoint --seed 0 --num 4 --grid -o .demo/cat.png
	@echo
	@echo "Wrote .demo/cat.png. The demo's checkpoint is small and its weights are random, so the picture is noise:"
	@echo "it shows that the installation works, not what HART can paint. With the released weights (a download):"
	@echo "    $(BIN)/hart-infer generate \"a cat\" -o cat.png --model mit-han-lab/hart-0.7b-1024px"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not packaging" $(PYTEST_ARGS)

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there are none

package: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m packaging $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hart_infer kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BUILD_FILES) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(BUILD_FILES) | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.installed
