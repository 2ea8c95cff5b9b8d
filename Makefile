# Everything on a machine with git, make and Python >= 3.11:
#   make repro [SCALE=small|paper]   install, then run the experiments up to the report
#   make test                        install, then check style and types and run the tests
PYTHON ?= python3
SCALE ?= sample
VENV := .venv
comma := ,
# The compiler of the CUDA kernels where there is a driver to run them.
EXTRAS := pipeline,test$(if $(shell command -v nvidia-smi),$(comma)cuda)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# uv does not look where pip is told to look, so pass that on.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif

.PHONY: setup repro test clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed; $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

repro: setup
	python -m pipeline repro --scale $(SCALE)

test: setup
	ruff check .
	ruff format --check .
	mypy
	python -m pytest --numprocesses 2 --dist loadgroup

clean:
	rm -rf $(VENV) data runs results/sample results/small ledger/sample ledger/small
