# make train: everything from nothing to a tested classifier.   make test: everything from nothing to tested code.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INPUTS := pyproject.toml constraints.txt

# $(1): what to install. uv where it is installed, else venv and pip; the same versions either way.
define install
	@if command -v uv >/dev/null; then \
	    { test -d .venv || uv venv --seed --python $(PYTHON) .venv; } && \
	    uv pip install --python .venv --editable "$(1)" --constraint constraints.txt; \
	else \
	    { test -d .venv || $(PYTHON) -m venv .venv; } && \
	    $(BIN)/python -m pip install --quiet --editable "$(1)" --constraint constraints.txt; \
	fi
	@touch $@
endef

.PHONY: train test lint format docs bench clean

train: .venv/installed
	$(BIN)/python scripts/train.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/installed-docs
	rm -f docs/api/*.rst
	$(BIN)/python -m sphinx -W --keep-going -n docs build/docs
	@echo "To read them: build/docs/index.html"

bench: .venv/installed-dev
	@mkdir -p build
	@printf '# Results\n\nWritten by `make bench`.\n\n' > build/RESULTS.md
	$(BIN)/python benchmarks/train_speed.py >> build/RESULTS.md
	$(BIN)/python benchmarks/train_speed.py --net mlp lenet resnet9 --how by_hand --rounds 15 >> build/RESULTS.md
	$(BIN)/python benchmarks/data_path.py >> build/RESULTS.md
	$(BIN)/python benchmarks/scaling.py >> build/RESULTS.md
	mv build/RESULTS.md benchmarks/RESULTS.md

.venv/installed: $(INPUTS)
	$(call install,.)

.venv/installed-dev: $(INPUTS)
	$(call install,.[dev])
	@touch .venv/installed

.venv/installed-docs: $(INPUTS)
	$(call install,.[docs])
	@touch .venv/installed

clean:
	rm -rf .venv
