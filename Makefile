# On a fresh machine with Python 3.11 or newer: `make demo` shows the main job, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST ?= .venv-newest
SITE_VENV ?= .venv-docs
# Not the newest: PyPI's newest wheel for Linux brings gigabytes of CUDA libraries. `make newest TORCH=...` tries another.
TORCH ?= 2.13.0
# Tests on so many processes, one thread each: tiny models gain nothing by a second thread.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile
# What other versions of libraries break: loading, generation, export, families, and what consumers run.
NEWEST_TESTS := $(addprefix tests/test_,runtime.py token_weights.py refusals.py loading.py upgrade.py stock_classes.py generation.py export.py \
	families.py consumer.py vlm_runtime.py vlm_generation.py)

.PHONY: setup demo test test-newest newest fuzz lint docs schema bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/comp prune demo --ratio 0.5 -o out/demo-compact --overwrite
	$(BIN)/comp export out/demo-compact -o out/demo-onnx --overwrite
	$(BIN)/comp bench out/demo-compact --baseline demo

test: setup
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

# Ten times the inputs of the suite's fuzzers, others each time.
fuzz: setup
	$(BIN)/python -m pytest -q -k fuzz --hypothesis-profile=long tests

# The newest of everything, as `pip install .` without constraints takes it. A version that cannot be had any more is no reason
# to fail: then whatever is the newest today is tested.
test-newest: $(NEWEST)/.done
	$(NEWEST)/bin/python -m pytest -q $(SIDE_BY_SIDE) $(NEWEST_TESTS) \
		-k "not benchmarked and not standard_operators and not analysed"

$(NEWEST)/.done: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q -U pip
	$(NEWEST)/bin/pip install -q -c constraints-newest.txt -e '.[dev]' || \
		$(NEWEST)/bin/pip install -q 'torch==$(TORCH)' -e '.[dev]'
	touch $@

# Resolves the newest versions afresh, and writes them down; then `make test-newest`.
newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q -U pip
	$(NEWEST)/bin/pip install -q 'torch==$(TORCH)' -e '.[dev,docs]'
	$(NEWEST)/bin/python .ci/newest.py > constraints-newest.txt.partial
	mv constraints-newest.txt.partial constraints-newest.txt
	touch $(NEWEST)/.done

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The site, into out/site; a warning is an error (not with --quiet, which hides them from --strict). Pages of the API come from
# docstrings, which are read and not run: no torch.
docs: $(SITE_VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict

$(SITE_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/pip install -q -U pip
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(SITE_VENV)/requirements.txt
	$(SITE_VENV)/bin/pip install -q -c constraints.txt -r $(SITE_VENV)/requirements.txt
	touch $@

# docs/schema, which describes what --json prints; made of the reports' dataclasses.
schema: setup
	$(BIN)/python -m comp_cli.report.schema docs/schema

bench: setup
	test -d out/demo-compact || $(BIN)/comp prune demo --ratio 0.5 -o out/demo-compact
	$(BIN)/comp bench out/demo-compact --baseline demo --iterations 50 --duration 20

clean:
	rm -rf $(VENV) $(NEWEST) $(SITE_VENV) out build dist *.egg-info
