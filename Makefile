# `make demo`, `make test` and `make test-all` work from a fresh clone: Python 3.10+ with venv, g++
# and make.
# Each makes .venv once and reinstalls only when a source of the build or a pin has changed.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTANTS_ARGS ?=
CALLS ?= 100000
EDITS ?= 2000
OUT ?= gpu-results

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip
# Isolated builds get the pins too, so that a new setuptools or pybind11 cannot change the result.
PINS := -c constraints.txt --build-constraint constraints.txt

BUILD_SOURCES := $(shell find csrc -type f ! -name '*.json') setup.py MANIFEST.in pyproject.toml constraints.txt
NATIVE_SOURCES = $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Four photographs that the wheels of scikit-image and scikit-learn ship.
PHOTOS := skimage/data/coffee.png skimage/data/camera.png \
          sklearn/datasets/images/china.jpg sklearn/datasets/images/flower.jpg
SITE := import os, sysconfig; print(os.path.relpath(sysconfig.get_paths()["platlib"]))

.PHONY: demo test test-all durations bench docs report gpu reliability budgets mutants lint clean \
        qemu cross

demo: $(VENV)/.demo
	$(BIN)/effnet-fast bench --model b0 --rounds 3
	$(BIN)/effnet-fast bench --model lite0 --rounds 3
	SITE=$$($(BIN)/python -c '$(SITE)') && \
	    $(BIN)/effnet-fast classify --compare --top 3 $(addprefix $$SITE/,$(PHOTOS))
	rm -rf build/digits build/digits-run
	$(BIN)/python examples/digits.py build/digits
	$(BIN)/effnet-fast train build/digits --model lite0 --weights DEFAULT --resolution 64 \
	    --batch 32 --epochs 3 --seed 5 --flip 0 --out build/digits-run
	$(BIN)/effnet-fast eval build/digits-run build/digits
	$(BIN)/effnet-fast classify --weights build/digits-run --top 1 \
	    build/digits/val/3/0083.png build/digits/val/7/0007.png

# Three tiers of tests: `pytest` alone is quick, `make test` adds what users run,
# and `make test-all` runs what `make test` leaves out.
# tests/durations.csv has the time and the tier of every long test.
RUN_TESTS = PATH="$(CURDIR)/$(VENV)/qemu/usr/bin:$(CURDIR)/$(BIN):$$PATH" \
            $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.test qemu
	$(RUN_TESTS) -m "not exhaustive and not gpu" $(PYTEST_ARGS)

test-all: $(VENV)/.test qemu cross docs
	$(RUN_TESTS) -m "exhaustive and not gpu" $(PYTEST_ARGS)

# What every long test costs, into tests/durations.csv, which the tiers were cut from; over an hour.
durations: $(VENV)/.test qemu cross
	$(RUN_TESTS) -m "not gpu" -p durations --costs tests/durations.csv

# Each op, block and network once, its peers installed: about ten minutes on two cores.
# BENCH_ARGS=--full holds every contest, which takes hours.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --record $(BENCH_ARGS)

# The documentation site with its API reference, into build/docs; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

# Tables and figures in docs/ and README.md, from benchmarks/results/*.csv.
report: $(VENV)/.test
	$(BIN)/python -m benchmarks.report

# Build, parity, timings and counters on an NVIDIA GPU, with the Python and packages that are there.
# OUT is the folder for results; PART one of parity, kernels, networks, tune, which are all that is
# run where none is named, compiled, more; DRY_RUN=1 only lists.
gpu:
	$(PYTHON) -m benchmarks.gpu --out "$(OUT)" $(if $(PART),--part $(PART)) \
	    $(if $(COMMIT),--commit $(COMMIT)) $(if $(DRY_RUN),--dry-run)

# What docs/reliability.md records: drawn edits of models, and calls of the registered ops with
# drawn arguments under AddressSanitizer.
reliability: $(VENV)/.test
	$(BIN)/python tests/support/drawn_edits.py --edits $(EDITS)
	$(BIN)/python tests/support/drawn_calls.py --count $(CALLS) --sanitize build/sanitized

# What the CUDA kernels may take from now on, into csrc/cuda/budgets.json; a minute.
budgets: $(VENV)/.test
	$(BIN)/python tests/support/cuda_budgets.py --update

# Whether the tests of `make test` notice each of a list of small faults; resumes where it stopped.
mutants: $(VENV)/.test
	$(BIN)/python tests/support/mutants.py $(MUTANTS_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f effnet_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.pip: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -qq --upgrade pip -c constraints.txt
	touch $@

$(VENV)/.demo: $(VENV)/.pip $(BUILD_SOURCES)
	@echo "Installing into $(VENV): PyTorch is a large download, the kernels compile for a minute."
	$(PIP) install -qq $(PINS) -e '.[pretrained]' accelerate scikit-image scikit-learn \
	    "tomli; python_version < '3.11'"
	touch $@

# With the CUDA kernels' host run (effnet_fast._C_simt) where nvcc is.
$(VENV)/.test: $(VENV)/.pip $(BUILD_SOURCES)
	@echo "Installing into $(VENV): PyTorch is a large download, the kernels compile for a minute."
	EFFNET_FAST_SIMT=auto $(PIP) install -qq $(PINS) -e '.[test]'
	touch $@

# The package is installed by then; named so, it brings in what is missing and is not built again.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) install -qq $(PINS) 'effnet-fast[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(PIP) install -qq $(PINS) 'effnet-fast[docs]'
	touch $@

# The tests of the plain and AVX2 kernels run under an emulated older CPU, those of the NEON kernels
# under an emulated Arm CPU. The emulators are unpacked into .venv, never installed; without them
# those tests are skipped and say so.
APT_QEMU = cd $(VENV)/qemu && apt-get -qq download qemu-user-static && \
           dpkg-deb --fsys-tarfile qemu-user-static_*.deb | \
           tar -x ./usr/bin/qemu-x86_64-static ./usr/bin/qemu-aarch64-static && rm -f *.deb

qemu: $(VENV)/.pip
	@mkdir -p $(VENV)/qemu
	@test -x $(VENV)/qemu/usr/bin/qemu-aarch64-static || \
	    { command -v qemu-x86_64-static && command -v qemu-aarch64-static; } >/dev/null || \
	    { command -v qemu-x86_64 && command -v qemu-aarch64; } >/dev/null || \
	    { ($(APT_QEMU)) >/dev/null 2>&1; } || \
	    { test "$$(id -u)" = 0 && apt-get -qq update >/dev/null 2>&1 && \
	      ($(APT_QEMU)) >/dev/null 2>&1; } || \
	    echo "qemu-user-static could not be fetched: the emulated-CPU tests will be skipped"

# What compiles the NEON kernels on another machine: Debian's g++ with all that it depends on but
# the sanitizers, 53 MB, unpacked as the emulators are.
CROSS := g++-aarch64-linux-gnu
APT_CROSS = cd $(VENV)/cross && apt-get -qq download $$(apt-get -s install \
            --no-install-recommends $(CROSS) | awk '/^Inst/ && $$2 !~ /san/ {print $$2}') && \
            for deb in *.deb; do dpkg-deb -x $$deb . || exit 1; done && rm -f *.deb

cross: $(VENV)/.pip
	@mkdir -p $(VENV)/cross
	@test -x $(VENV)/cross/usr/bin/aarch64-linux-gnu-g++ || \
	    command -v aarch64-linux-gnu-g++ >/dev/null || \
	    { ($(APT_CROSS)) >/dev/null 2>&1; } || \
	    { test "$$(id -u)" = 0 && apt-get -qq update >/dev/null 2>&1 && \
	      ($(APT_CROSS)) >/dev/null 2>&1; } || \
	    echo "$(CROSS) could not be fetched: the tests of the NEON kernels will be skipped"
