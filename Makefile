# make demo, test, lab: the workbench. make check, format, docs, results: for those who change it.
# Each sets the environment up when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lab check format docs results clean

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

# Two processes, a file of tests to each: on two cores that is twice as fast.
test: install
	$(BIN)/python -m pytest tests -q -n 2 --dist loadfile

lab: install
	$(BIN)/jupyter lab nbs/tours/00_tour.ipynb

# The fast gate, under a minute: form, exports, packages, and the tests that take no model's time.
QUICK := tests/test_layout.py tests/core tests/data tests/methods/test_rewards.py \
         tests/methods/test_dialogue.py tests/training/test_grpo.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(QUICK) -q -m "not slow and not browser"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# The documentation site, in site/. Nothing is downloaded and no notebook is run.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every figure of docs/results.md, made again: about eight hours on two cores, resumable.
results: install
	$(BIN)/python results/make.py run
	$(BIN)/python results/make.py keep
	$(BIN)/python results/make.py write

clean:
	rm -rf build site *.egg-info .pytest_cache .hypothesis .ruff_cache
	find dr2seg_lib nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
