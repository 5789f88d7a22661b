# make train: set up .venv and train a DiracNet on data that needs no download
# make test:  set up .venv with the test extra and run every test
# make check: run the fast tests, those without the marker `slow`
# make check-oldest: run the fast tests, train, export and predict in .venv-oldest, with
#     Python 3.10 and the lowest versions that requirements.txt and pyproject.toml allow
# make check-newest: the same in .venv-newest, with Python 3.13 and the newest versions

PYTHON ?= python3
PYTHON-oldest ?= python3.10
PYTHON-newest ?= python3.13
RESOLUTION-oldest := lowest-direct
RESOLUTION-newest := highest
BIN := .venv/bin
ARGUMENTS := -n 2 --dist worksteal --max-worker-restart 0
TEST := $(BIN)/python test.py $(ARGUMENTS)

train: .venv/train.done
	$(BIN)/python train.py --dataset Digits --depth 16 --epochs 20 --epoch_step [12,17] \
	    --batch_size 64 --save runs/digits_$$(date +%Y%m%d_%H%M%S)

test: .venv/test.done
	$(TEST)

check: .venv/test.done
	$(TEST) -m "not slow"

check-oldest check-newest: check-%: .venv-%/test.done
	.venv-$*/bin/python test.py $(ARGUMENTS) -m "not slow"
	rm -rf .venv-$*/run
	.venv-$*/bin/python train.py --dataset Digits --depth 10 --epochs 1 --save .venv-$*/run
	.venv-$*/bin/python export.py .venv-$*/run --to .venv-$*/run/diracnet.onnx --dataset Digits
	.venv-$*/bin/python predict.py logs/bench.png --model .venv-$*/run/diracnet.onnx

.venv-oldest/test.done .venv-newest/test.done: .venv-%/test.done: requirements.txt pyproject.toml
	$(PYTHON-$*) -m venv --clear .venv-$*
	.venv-$*/bin/pip install uv
	.venv-$*/bin/uv pip install --python .venv-$*/bin/python --resolution $(RESOLUTION-$*) \
	    -r requirements.txt -e '.[test]'
	touch $@

.venv/train.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/test.done: .venv/train.done pyproject.toml
	$(BIN)/pip install -e '.[test]'
	touch $@

.PHONY: train test check check-oldest check-newest
