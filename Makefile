# `make demo` and `make test` do everything on a fresh machine; each makes .venv if there is none or its lock file has changed.
# PYTHON=python3 uses an interpreter that has vLLM already, as on a machine without a package index.
VENV ?= .venv
ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := venv
endif

.PHONY: help venv demo test test-gpu clean

help:
	@echo "make demo      serve the demo model with and without specontext and ask both (a few minutes)"
	@echo "make test      run all tests; those marked gpu where there is a GPU"
	@echo "make test-gpu  only the tests marked gpu"
	@echo "make venv      only make $(VENV)"
	@echo "PYTHON=...     use this interpreter instead of $(VENV)"

venv:
	@python3 scripts/bootstrap.py --venv $(VENV)

demo: $(READY)
	$(RUN) -m specontext_vllm.demo

test: $(READY)
	$(RUN) -m pytest

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache
