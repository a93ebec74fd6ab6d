# Every target runs in .venv; the first one sets it up with the versions that constraints.txt pins. Only `make gpu` uses
# $(PYTHON) as it is, with the torch and Triton that it has: a machine with a GPU may have no network.
# Another interpreter: make PYTHON=python3.12 test. Arguments of a target: make test ARGS="-k scan".

PYTHON ?= python3
DATA ?= mnist.npz
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.set-up

.DEFAULT_GOAL := help
.PHONY: help setup demo app test test-app test-wheel check docs bench gates gpu check-native faults fuzz soak matrix tools format clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## install the package and its tools into .venv

demo: $(STAMP)  ## train a Skip LSTM on handwritten digits, reload it, and show which pixels it reads
	$(RUN) scripts/demo.py

app: $(VENV)/.app  ## draw, type or speak in the browser, and see which steps a model reads
	$(RUN) scripts/space/app.py $(ARGS)

test: $(STAMP)  ## run the tests
	$(RUN) -m pytest --numprocesses auto $(ARGS)

test-app: $(VENV)/.test-app  ## use the app in a real browser; needs Chromium: apt-get install chromium
	$(RUN) -m pytest tests/app/test_app.py tests/app/browser.py $(ARGS)

test-wheel: $(STAMP)  ## build the wheel, install it into an environment of its own, and use it from an empty folder
	$(RUN) -m pytest -o faulthandler_timeout=1200 tests/wheel/walks.py $(ARGS)

check: $(STAMP) docs  ## check format, lint, types and imports, and build the documentation
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

docs: $(STAMP)  ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

check-native:  ## call the native engine's C interface with random arguments, under sanitizers
	tests/native/check.sh

faults: $(STAMP)  ## kill trainings at random moments and fill disks; what resumes must equal an undisturbed run
	$(RUN) tests/survival/kills.py $(ARGS)
	$(RUN) -m pytest tests/training/test_full_disk.py
	$(RUN) tests/survival/table.py

fuzz: $(STAMP)  ## run the tests of random configurations and damaged files, ten times as long
	FUZZ_SCALE=10 FUZZ_TABLE=tests/survival/fuzz.csv $(RUN) -m pytest tests/scans/test_configurations.py tests/model/test_hostile_files.py tests/triton/test_triton.py $(ARGS)
	$(RUN) tests/survival/table.py

soak: $(STAMP)  ## run the tests of long sequences, then 20 minutes of mixed requests
	FUZZ_SCALE=10 FUZZ_TABLE=tests/survival/long.csv $(RUN) -m pytest tests/scans/test_long.py
	$(RUN) tests/survival/soak.py $(ARGS)
	$(RUN) tests/survival/table.py

matrix:  ## run the tests with the oldest and with the newest libraries that are supported
	tests/matrix/run.sh $(ARGS)
	$(PYTHON) tests/survival/table.py

tools: $(VENV)/.tools  ## run the tests with other people's tools, and transformers' own tests of models
	$(RUN) tests/tools/run.py $(ARGS)

bench: $(STAMP)  ## time the native engine against nn.LSTM, nn.GRU and others; ARGS="--isa avx2": with AVX2 alone
	$(RUN) scripts/benchmark.py $(ARGS)

gates: $(STAMP)  ## train the learned gate and its rivals on every task, and report; takes days, and goes on where it was
	nice $(RUN) -m scripts.benchmarks.gates $(ARGS)

gpu:  ## on a machine with a CUDA GPU: check the Triton engine, time it, train with it on DATA=mnist.npz
	$(PYTHON) -m scripts.gpu.check $(DATA)

format: $(STAMP)  ## format the code and apply the fixes that are safe
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## remove builds and caches, not the results of runs
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environments
	rm -rf $(VENV) .venv-matrix

# The stamp is written last, so that the next run repairs an interrupted set-up: a virtual environment that does not run
# is made anew, and a package whose installation was interrupted (pip writes the file INSTALLER last) is installed again.
# There is no build isolation, so that the build uses the pinned setuptools, too.
$(STAMP): pyproject.toml constraints.txt $(wildcard hf_skiprnn/kernels/cpu/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"needs Python 3.11 or later, but $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@$(RUN) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@find $(VENV) -type d -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -rf '{}' +
	$(RUN) -m pip install --quiet --constraint constraints.txt setuptools
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[train,figures,audio,video,export,vectors,dev,docs]'
	@touch $@

$(VENV)/.app: $(STAMP) scripts/space/requirements.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --requirement scripts/space/requirements.txt
	@touch $@

$(VENV)/.test-app: $(VENV)/.app
	$(RUN) -m pip install --quiet --constraint constraints.txt playwright
	@touch $@

$(VENV)/.tools: $(STAMP)
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[tools]'
	@touch $@
