# make train: sets up .venv and trains a DiracNet on data that needs no download
# make test:  sets up .venv with the test extras and runs every test, in two processes of one thread

PYTHON ?= python3
BIN := .venv/bin

train: .venv/train.done
	$(BIN)/python train.py --dataset Digits --depth 16 --epochs 20 --epoch_step [12,17] \
	    --batch_size 64 --save checkpoints/digits_$$(date +%Y%m%d_%H%M%S)

test: .venv/test.done
	OMP_NUM_THREADS=1 $(BIN)/python test.py -n 2 --dist loadfile --max-worker-restart 0

.venv/train.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/test.done: .venv/train.done pyproject.toml
	$(BIN)/pip install -e '.[test]'
	touch $@

.PHONY: train test
