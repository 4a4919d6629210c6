# make demo    set everything up and answer a question over a real document
# make test    set everything up, lint, type-check, run the tests
# make clean   remove what the two leave in this folder

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: test lint clean
test: lint
	$(RUN) pytest

lint: $(VENV)/dev.stamp
	$(RUN) ruff check .
	$(RUN) mypy

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
