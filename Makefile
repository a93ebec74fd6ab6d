# Everything runs in .venv, which the first target that needs it sets up: constraints.txt pins every version.
# `make gpu` alone uses $(PYTHON) as it is, with its own torch and Triton: such a machine may have no network.
# Another interpreter: make PYTHON=python3.12 test. Arguments for pytest: make test ARGS="-k scan".

PYTHON ?= python3
DATA ?= mnist.npz
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.set-up

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench gpu check-native faults fuzz soak matrix format clean distclean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## install the package and its tools into .venv

demo: $(STAMP)  ## train a Skip LSTM on handwritten digits, reload it and show what it read
	$(RUN) scripts/demo.py

test: $(STAMP)  ## run the tests
	$(RUN) -m pytest --numprocesses auto $(ARGS)

check: $(STAMP)  ## check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check-native:  ## run the native engine's C interface on random calls, under sanitizers
	tests/native/check.sh

faults: $(STAMP)  ## kill trainings at random moments, fill disks; compare what is left with undisturbed runs
	$(RUN) tests/survival/kills.py $(ARGS)
	$(RUN) -m pytest tests/test_full_disk.py
	$(RUN) tests/survival/table.py

fuzz: $(STAMP)  ## thousands of random configurations, files and configs
	FUZZ_SCALE=10 FUZZ_TABLE=tests/survival/fuzz.csv $(RUN) -m pytest tests/test_configurations.py tests/test_hostile_files.py $(ARGS)
	$(RUN) tests/survival/table.py

soak: $(STAMP)  ## long sequences, and 20 minutes of mixed traffic
	FUZZ_SCALE=10 FUZZ_TABLE=tests/survival/long.csv $(RUN) -m pytest tests/test_long.py
	$(RUN) tests/survival/soak.py $(ARGS)
	$(RUN) tests/survival/table.py

matrix:  ## run the tests on the oldest and newest versions of torch, transformers, datasets and huggingface_hub
	tests/matrix/run.sh $(ARGS)
	$(PYTHON) tests/survival/table.py

bench: $(STAMP)  ## time the native engine against nn.LSTM, nn.GRU and others
	$(RUN) scripts/benchmark.py $(ARGS)

gpu:  ## on a machine with a CUDA GPU, check the Triton engine, time it and train with it on DATA=mnist.npz
	$(PYTHON) scripts/gpu.py $(DATA)

format: $(STAMP)  ## format the code and apply the safe fixes
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## remove builds and caches; what runs have written stays
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV) .venv-matrix

# The stamp is written last, so an interrupted set-up is taken up again. A virtual environment that does not run is made
# anew; a package whose installation was cut short (pip writes INSTALLER after the package's files) is installed again.
# Without build isolation the build, too, uses a pinned setuptools.
$(STAMP): pyproject.toml constraints.txt $(wildcard hf_skiprnn/kernels/cpu/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"needs Python 3.11 or later, but $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@$(RUN) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@find $(VENV) -type d -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -rf '{}' +
	$(RUN) -m pip install --quiet --constraint constraints.txt setuptools
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[train,figures,audio,video,export,vectors,dev]'
	@touch $@
