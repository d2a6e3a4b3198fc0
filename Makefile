# make demo: see it work.  make test: prove it right (what CI runs).  make lint: the style.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/python -m weights.draw "a photograph of a horse" --out runs/demo.png $(if $(wildcard weights/sd15/unet),,$(RANDOM_TINY))
	@echo "Look at runs/demo.png. Next: \`make test\`; or get the official weights with \`$(BIN)/python -m weights.fetch\` (5.5 GB) and run this again."

# Without the official weights: the same path at miniature size, whose right answer is noise.
RANDOM_TINY := --weights random --model tiny --steps 10

test: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu and not weights"

lint: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The stamps are touched only after success, so an interrupted installation is taken up again.
.venv/.run: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
