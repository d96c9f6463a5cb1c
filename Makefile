# On a fresh machine with Python 3.11 or newer: `make demo` shows the main job, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test fuzz lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/comp prune demo --ratio 0.5 -o out/demo-compact --overwrite
	$(BIN)/comp export out/demo-compact --onnx -o out/demo-onnx --overwrite
	$(BIN)/comp bench out/demo-compact --baseline demo

test: setup
	$(BIN)/python -m pytest -q

# Ten times the inputs of the suite's fuzzers, others each time.
fuzz: setup
	$(BIN)/python -m pytest -q -k fuzz --hypothesis-profile=long tests

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: setup
	test -d out/demo-compact || $(BIN)/comp prune demo --ratio 0.5 -o out/demo-compact
	$(BIN)/comp bench out/demo-compact --baseline demo --iterations 50 --duration 20

clean:
	rm -rf $(VENV) out build dist *.egg-info
