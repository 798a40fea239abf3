# make train: everything from nothing to a tested classifier.   make test: everything from nothing to tested code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INPUTS := pyproject.toml constraints.txt

# $(1): what to install. uv where it is installed, else venv and pip; the same versions either way.
define install
	@if command -v uv >/dev/null; then \
	    { test -d $(BIN) || uv venv --seed --python $(PYTHON) $(VENV); } && \
	    uv pip install --python $(VENV) --editable "$(1)" --constraint constraints.txt; \
	else \
	    { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); } && \
	    $(BIN)/python -m pip install --quiet --editable "$(1)" --constraint constraints.txt; \
	fi
	@touch $@
endef

.PHONY: train test lint format docs bench clean

train: $(VENV)/installed
	$(BIN)/python scripts/train.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/installed-docs
	rm -f docs/api/*.rst
	$(BIN)/python -m sphinx -W --keep-going -n docs build/docs
	@echo "To read them: build/docs/index.html"

bench: $(VENV)/installed-dev
	@mkdir -p build
	@printf '# Results\n\nEach part is what the command in it printed; `make bench` runs them.\n\n' > build/RESULTS.md
	$(BIN)/python benchmarks/train_speed.py --net mlp lenet resnet9 --how by_hand >> build/RESULTS.md
	$(BIN)/python benchmarks/train_speed.py --net lenet --rounds 3 >> build/RESULTS.md
	$(BIN)/python benchmarks/data_path.py >> build/RESULTS.md
	$(BIN)/python benchmarks/augment.py >> build/RESULTS.md
	$(BIN)/python benchmarks/scaling.py --rounds 3 >> build/RESULTS.md
	$(BIN)/python benchmarks/startup.py >> build/RESULTS.md
	$(BIN)/python benchmarks/growth.py --rounds 1 >> build/RESULTS.md
	mv build/RESULTS.md benchmarks/RESULTS.md

$(VENV)/installed: $(INPUTS)
	$(call install,.)

$(VENV)/installed-dev: $(INPUTS)
	$(call install,.[dev])
	@touch $(VENV)/installed

$(VENV)/installed-docs: $(INPUTS)
	$(call install,.[docs])
	@touch $(VENV)/installed

clean:
	rm -rf $(VENV)
