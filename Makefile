# make demo: see it work.  make test: prove it right (what CI runs).  make lint: the style.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/python -m weights.draw --weights random --model tiny --steps 10 --out runs/demo.png "sheep, grass, sky"

test: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu and not weights"

lint: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The stamps are touched only after success, so an interrupted installation is taken up again.
.venv/.run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
