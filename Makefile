# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A file of tests a worker, a worker a core: what a file fits once is fitted once.
WORKERS = --numprocesses logical --dist loadfile

.PHONY: demo test test-slow docs notebooks clean

demo: $(VENV)/.installed-demo
	$(BIN)/python notebooks/run.py quickstart --into results

test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/pytest $(WORKERS)

# What takes minutes: the slow tests, and every notebook, where the documentation is built.
test-slow: docs
	$(BIN)/pytest --numprocesses logical --dist worksteal -m slow

# Runs every notebook; an error in one is an error.
docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going -q -b html -D nb_execution_mode=force docs docs/_build/html

# Runs them to keep their new outputs.
notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/run.py

# The demo installs what its notebook needs; the rest needs everything, PyTorch too.
$(VENV)/.installed-demo: EXTRA = demo
$(VENV)/.installed: EXTRA = dev
$(VENV)/.installed-demo $(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf $(VENV) results docs/_build
