# make demo   sets up and runs the main job on what ships with the project
# make demo-fast   the same, and the student draws in two steps without guidance
# make test   sets up and runs the fast tests
# make lowest  tests with the oldest versions that pyproject.toml allows; several GB
# make docs   the documentation as a site, in build/site
# make check  format, lint, types, which room may import which

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo demo-fast test test-processes test-slow lowest docs check format clean

setup: $(VENV)/.done

# torchvision has no build for a CPU wheel of torch, and transformers fails where it finds one that does not fit. What the
# Inception network needs of it therefore lies apart, for the tests: PYTHONPATH=.venv/eval prunet measure ...
# The Makefile's own stamp: set up again when what is required changes.
$(VENV)/.done: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; give another with PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): about 2.3 GB, some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,data,docs,ui]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/eval torch-fidelity torchvision
	@touch $@

demo: setup
	$(BIN)/prunet run demo --device cpu

demo-fast: setup
	$(BIN)/prunet run demo-fast --device cpu

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

test-processes: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m processes

test-slow: setup
	$(BIN)/python -m pytest -m slow -s

# In an environment of its own; not part of CI, because it downloads a second torch.
LOWEST := build/lowest
OLDEST := --resolution lowest-direct --python-version 3.11 --extra data --extra personalize --extra gguf
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet $(OLDEST) pyproject.toml -o $(LOWEST)/oldest.txt
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python -r $(LOWEST)/oldest.txt pytest pytest-xdist hypothesis
	PYTHONPATH=. $(LOWEST)/bin/python -m pytest -n auto \
	    $(addprefix tests/test_,plan.py recipe.py ldm.py latents.py pictures.py student.py run.py personalize.py)

# Material's own notice asks for its successor, which does not call hooks yet.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html; its search needs a server: python -m http.server -d build/site"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=emoji $(BIN)/mypy --config-file benchmarks/mypy.ini emoji/*.py
	MYPYPATH=benchmarks:tests $(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build *.egg-info
