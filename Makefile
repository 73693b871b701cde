# Four commands: make demo, make test, make lab, make clean. They set the environment up when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lab clean

install: $(STAMP)

# sam2 is built on the torch that the first line brings, so it comes second; its hash is checked.
$(STAMP): settings.ini setup.py constraints.txt requirements-sam2.txt
	$(PYTHON) -c "import sys; v = '%d.%d' % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and f'Python 3.11 or newer is needed, {v} found; name one: make PYTHON=python3.11')"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[dev,sam2]"
	SAM2_BUILD_CUDA=0 $(BIN)/pip install --no-deps --no-build-isolation --require-hashes -r requirements-sam2.txt
	touch $@

# The defaults of the train experiment are the demo: the DR2Seg recipe on the embedded world.
demo: install
	$(BIN)/dr2seg run train

test: install
	$(BIN)/python -m pytest tests -q

lab: install
	$(BIN)/jupyter lab nbs/tours/00_tour.ipynb

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis
	find dr2seg_lib nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
