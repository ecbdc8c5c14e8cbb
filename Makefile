# make demo      the README's picture in INT8, demo.png
# make test      lint, types and the quick tests
# make test-all  the same with the slow tests, and the GPU tests where there is a GPU
# make format    let ruff rewrite the sources
# make cuda      the CUDA library for this checkout, sana_edge/libsana_edge_cuda.so: minutes, then what changed
# make gpu-check builds, tests and times on a machine with a GPU, with PYTHON as it is: build/gpu-check/
# make wheel     dist/*.whl, with the CUDA library where nvcc is
# make clean     remove what the others wrote, but not .venv
#
# All of them but `cuda` and `gpu-check` create .venv first, from PYTHON, and install into it again when the requirements change.
# That installation is editable and never runs nvcc. SANA_EDGE_CUDA_ARCHS=89 builds for one's own GPU only.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALL := $(RUN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml setup.py constraints.txt

PROMPT ?= a red car left of a house on a meadow
SEED ?= 7
STEPS ?= all

.PHONY: demo test test-all lint format cuda gpu-check wheel clean

demo: $(VENV)/torch.stamp
	$(RUN)/sana-edge generate --prompt "$(PROMPT)" --seed $(SEED) --int8 --output demo.png --force

# a file of tests stays together, for what its tests share; a worker that dies ends the run, which would wait for ever
WORKERS := -n auto --dist loadfile --max-worker-restart 0
# a quick test that hangs tells where, and ends the run
ENDING := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test: lint
	$(RUN)/pytest $(WORKERS) $(ENDING) -m "not slow and not gpu and not alone"
	$(RUN)/pytest $(ENDING) -m "not slow and not gpu and alone"

test-all: lint
	$(RUN)/pytest $(WORKERS) -m "not gpu and not alone"
	$(RUN)/pytest -m "gpu or alone"

lint: $(VENV)/test.stamp
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(VENV)/test.stamp
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

cuda:
	$(PYTHON) csrc/compile.py

# .venv where it is, or any Python that has torch
gpu-check:
	$(if $(wildcard $(VENV)/test.stamp),$(RUN)/python,$(PYTHON)) benchmarks/gpu_check.py --steps $(STEPS)

wheel: $(VENV)/test.stamp
	$(RUN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo.png sana_edge/*.so
	find sana_edge kernels csrc benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's script is the last file that venv writes: an interrupted creation is repeated
$(RUN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: $(REQUIREMENTS) | $(RUN)/pip
	$(INSTALL) --editable '.[torch]'
	touch $@

# the test requirements include those of the demo
$(VENV)/test.stamp: $(REQUIREMENTS) | $(RUN)/pip
	$(INSTALL) --editable '.[test]'
	touch $@ $(VENV)/torch.stamp
