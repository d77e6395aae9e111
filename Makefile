# `make demo` and `make test` work on a fresh machine; each makes .venv if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

# What decides whether the installed environment is still the right one.
BUILD_FILES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cu csrc/*.cpp csrc/include/* csrc/cpu/*)

# For `make newest` and `make oldest`: the tests of what stands on other libraries. Of constraints.txt only torch counts;
# TORCH=2.14.1 takes another, TORCH="2.*" the newest, on Linux a CUDA build of several GB.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
LIBRARIES := transformers tokenizers huggingface_hub numpy safetensors pillow tqdm sentencepiece
OLDEST := "transformers==4.45.*" "tokenizers==0.20.*" "huggingface_hub==0.25.*" "numpy==1.26.*" safetensors==0.4.3 "pillow==10.1.*" "sentencepiece==0.1.99"
BESIDE := tests/packaging/test_versions.py tests/models/test_text.py tests/golden/test_text.py tests/checkpoints tests/images \
	tests/pipelines tests/test_mini.py tests/cli tests/models/vila_u tests/generation

.PHONY: demo test slow sample gpu gpu-figures kernels torches newest oldest package lint format types clean

demo: $(VENV)/.installed
	$(BIN)/hart-infer generate --prompts recipes/mini/demo.txt --seed 0 --grid 4 --quiet -o .demo/hart-mini.png
	@echo
	@echo "That is hart-mini, a small HART that comes with the package and draws emoji: the 1,310 of recipes/mini/vocabulary.txt."
	@echo "Try your own:"
	@echo "    $(BIN)/hart-infer generate \"a pizza, noto style\" \"a pizza, fluent style\" --num 4 --grid -o pizzas.png"
	@echo "    $(BIN)/hart-infer generate \"a pizza\" --preview-dir scales/ -o pizza.png   # scale by scale"
	@echo "    $(BIN)/hart-infer generate sauropod doughnut rocket --grid -o emoji.png --model var-mini   # 517 emoji by name"
	@echo "The released model paints 1024 px pictures of anything (a download of several GB on first use):"
	@echo "    $(BIN)/hart-infer generate \"a cat on a red sofa\" -o cat.png --model mit-han-lab/hart-0.7b-1024px"

test: $(VENV)/.installed-dev  # a process a core: each computes with one thread
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu and not packaging" $(PYTEST_ARGS)

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there are none

sample: $(VENV)/.installed-dev  # some of the slow ones, for every CI run
	$(BIN)/python -m pytest -n auto -m "sample and not gpu" $(PYTEST_ARGS)

# On a machine with a CUDA device; figures go to $HART_INFER_RESULTS or benchmarks/results. GPU_PYTHON=python3 takes an
# environment that has the package already (pip install --no-deps --no-build-isolation -e .), such as one without a network.
gpu: $(if $(GPU_PYTHON),,$(VENV)/.installed-dev)
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest tests/gpu tests/ops tests/csrc/test_norms.py $(PYTEST_ARGS)

gpu-figures: $(if $(GPU_PYTHON),,$(VENV)/.installed-dev)  # after `make gpu`: times attention's tiles, writes the winners, then all latencies
	$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/attention_tiles.py --write --out benchmarks/results/attention_tiles.json
	$(or $(GPU_PYTHON),$(BIN)/python) tools/compile_kernels.py --source triton --only attention --out tools/compiled_kernels.json
	$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/latency.py --out benchmarks/results/latency.json

kernels: $(VENV)/.installed-dev  # compiles them, without a GPU, and fails where one is worse than on record
	$(BIN)/python tools/compile_kernels.py --capability 80 90 --compare tools/compiled_kernels.json

torches: $(VENV)/.installed-dev  # the wheel beside other versions of torch; each takes several GB and some minutes
	HART_INFER_TORCHES="$(or $(TORCHES),2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0)" $(BIN)/python -m pytest tests/packaging/test_torches.py $(PYTEST_ARGS)

# Whichever module a warning names: transformers and huggingface_hub warn of our arguments from wrappers of their own.
newest: WANTED := $(LIBRARIES)
newest: STRICT := -W error::DeprecationWarning -W error::FutureWarning
oldest: WANTED := $(OLDEST)
newest oldest:
	$(PYTHON) -m venv $(VENV)-$@
	echo "*" > $(VENV)-$@/.gitignore
	$(VENV)-$@/bin/python -m pip install --upgrade --upgrade-strategy eager "torch==$(TORCH)" $(WANTED) pytest -e .
	$(VENV)-$@/bin/python -m pip list
	$(VENV)-$@/bin/python -m pytest -m "not slow and not gpu and not packaging" $(STRICT) $(BESIDE) $(PYTEST_ARGS)

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
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hart_infer kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BUILD_FILES) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(BUILD_FILES) | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.installed
