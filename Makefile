# make train: set up .venv and train a DiracNet on data that needs no download
# make test:  set up .venv with the test extra and run every test
# make check: run the fast tests, those without the marker `slow`

PYTHON ?= python3
BIN := .venv/bin
TEST := OMP_NUM_THREADS=1 $(BIN)/python test.py -n 2 --dist worksteal --max-worker-restart 0

train: .venv/train.done
	$(BIN)/python train.py --dataset Digits --depth 16 --epochs 20 --epoch_step [12,17] \
	    --batch_size 64 --save runs/digits_$$(date +%Y%m%d_%H%M%S)

test: .venv/test.done
	$(TEST)

check: .venv/test.done
	$(TEST) -m "not slow"

.venv/train.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/test.done: .venv/train.done pyproject.toml
	$(BIN)/pip install -e '.[test]'
	touch $@

.PHONY: train test check
