# make demo: train, evaluate, predict.  make test: lint and all tests that CI runs.  make lint: fix the style.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/python train.py --preset demo --run runs/demo
	$(BIN)/python eval.py runs/demo --worst 8
	$(BIN)/python -m images.scenes --count 6 --out runs/demo/images
	$(BIN)/python predict.py runs/demo runs/demo/images --attention --out runs/demo/predicted
	$(BIN)/python predict.py runs/demo runs/demo/images --words "sea, boat" --out runs/demo/steered
	@echo "Results are in runs/demo: inputs.jpg, val/, curve.png, eval-val/result.md, confusion.png and worst/, predicted/ with the attention of each tag,"
	@echo "and steered/, the same images predicted with the words sea and boat."
	@echo "Next: $(BIN)/python train.py --help; --condition oracle trains with ground-truth tags (the paper's Figure 1);"
	@echo "--dataset folder --data DIR trains on your own images; see README.md for the official weights."

test: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu and not weights and not browser and not sweep"

lint: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The stamps are touched only after success, so an interrupted installation is resumed.
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
