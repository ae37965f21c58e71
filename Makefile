# Everything a person needs, one line each: `make help`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
QWEN := $(BIN)/qwen-onnx
MODEL ?= qwen2.5-coder-0.5b-instruct
SCHEME ?= int4
PACKAGE ?= artifacts/$(MODEL)-cpu-$(SCHEME)
PORT ?= 8000
# Processes that tests run in.
WORKERS ?= 2
# More options of `qwen-onnx build`, such as --junit FILE.
OPTIONS ?=
PROMPT ?= Write a Python function that checks whether a string is a palindrome.
READY := $(VENV)/ready
OPENVINO := .venv-openvino
LLAMACPP := .venv-llamacpp
SNAKEMAKE := .venv-snakemake

.DEFAULT_GOAL := help
.PHONY: help cpu cuda directml webgpu tensorrt-rtx npu openvino $(OPENVINO) $(LLAMACPP) $(SNAKEMAKE) cuda-runtime targets test test-all slurm runtimes handoff samples lint recipes verify serve bench report clean

help: ## show this list
	@sed -n 's/^\([a-z -]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(READY): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned tools into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[build,serve,sign,oci,dev]'
	@touch $@

$(OPENVINO): $(OPENVINO)/ready
$(OPENVINO)/ready: pipeline/data/constraints-openvino.txt
	@rm -rf $(OPENVINO) && $(PYTHON) -m venv $(OPENVINO)
	@echo "installing OpenVINO's tools into $(OPENVINO) (once, 2 GB)"
	@$(OPENVINO)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< olive-ai onnx openvino nncf optimum-intel
	@# Required by optimum-intel, not used for text, and unloadable beside a torch that was built for processors alone.
	@$(OPENVINO)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

# From its sources: a wheel that was compiled elsewhere would not use what this processor can do.
$(LLAMACPP): $(LLAMACPP)/ready
$(LLAMACPP)/ready: pipeline/data/constraints-llamacpp.txt
	@rm -rf $(LLAMACPP) && $(PYTHON) -m venv $(LLAMACPP)
	@echo "compiling llama.cpp into $(LLAMACPP) (once; needs a C++ compiler, and a quarter of an hour on two cores)"
	@CMAKE_ARGS="-DGGML_NATIVE=ON $$CMAKE_ARGS" $(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check --no-binary llama_cpp_python --constraint $< llama_cpp_python
	@touch $@

$(SNAKEMAKE): $(SNAKEMAKE)/ready
$(SNAKEMAKE)/ready: pipeline/data/constraints-snakemake.txt
	@rm -rf $(SNAKEMAKE) && $(PYTHON) -m venv $(SNAKEMAKE)
	@echo "installing Snakemake into $(SNAKEMAKE) (once)"
	@$(SNAKEMAKE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< snakemake snakemake-executor-plugin-slurm
	@touch $@

cpu: ## build, validate and package $(MODEL) for CPUs, and ask it something
cuda directml webgpu: ## the same for GPUs; without one it is validated on the processor, and says so
tensorrt-rtx: ## the same for RTX GPUs
npu: ## the same for Qualcomm NPUs, 8-bit weights, validated in the emulator: half an hour
npu: SCHEME := int8
openvino: ## the same for Intel NPUs, validated on OpenVINO's device for processors
openvino: $(if $(QWEN_ONNX_OPENVINO),,$(OPENVINO))
cpu cuda directml webgpu tensorrt-rtx npu openvino: $(READY)
	@$(QWEN) build recipes/$(MODEL)/$@-$(SCHEME).yaml --prompt '$(PROMPT)' $(OPTIONS)

targets: $(READY) ## what each target is, and what this machine can do for it
	@$(QWEN) targets

cuda-runtime: $(READY) ## on a machine with an NVIDIA GPU: let `make cuda` validate on it
	@$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-genai
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check onnxruntime-gpu==1.31.1 onnxruntime-genai-cuda==0.14.1

test: $(READY) ## all tests but those on the real checkpoint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=20 -m 'not real'

test-all: test ## all tests; those on the real checkpoint one after the other, since each takes all cores
	@$(BIN)/python -m pytest --durations=10 -m real

slurm: $(READY) $(SNAKEMAKE) ## build through Snakemake on a Slurm of one node, which this starts: needs root, slurm-wlm, munge
	@QWEN_ONNX_SLURM=1 $(BIN)/python -m pytest -m slow -k slurm tests/test_workflow.py

runtimes: $(READY) ## replay packages with the oldest and the newest runtime that is claimed, in environments of their own
	@$(BIN)/python tests/runtimes.py

handoff: ## follow the README of $(PACKAGE) in an environment with nothing else, as an app team does
	@$(PYTHON) tests/handoff.py $(PACKAGE)

samples: ## what deploy/samples/chat.mjs needs, into that folder (350 MB)
	@cd deploy/samples && npm install --ignore-scripts --no-package-lock --no-audit --no-fund --silent

lint: $(READY) ## style, types and floors
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

recipes: $(READY) ## check every recipe, options of Olive passes included
	@$(QWEN) recipe list && $(QWEN) recipe lint $$(find recipes -name '[a-z]*.yaml' -not -path '*/_*')

verify: $(READY) ## check $(PACKAGE) and replay its golden transcript here
	@$(QWEN) verify $(PACKAGE) --replay

bench: $(READY) ## time $(PACKAGE) against Olive's plain INT4 and, after `make .venv-llamacpp`, llama.cpp
	@$(QWEN) bench $(PACKAGE) --against plain-olive --against llama.cpp

report: $(READY) ## write artifacts/index.html: all packages side by side
	@$(QWEN) report

serve: $(READY) ## answer over HTTP with $(PACKAGE), as OpenAI's API does; PORT=8000
	@$(QWEN) serve $(PACKAGE) --port $(PORT)

clean: ## remove packages, store and caches; the virtual environments stay
	rm -rf artifacts/* artifacts/.store .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
