# Everything is made inside .venv; nothing else on the machine changes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install --no-build-isolation --editable
# What an extra of pyproject.toml asks for, without the package itself: that is compiled once, by .base.
EXTRAS = @$(BIN)/python .ci/extras pyproject.toml $(1) > $(VENV)/extras.txt && $(PIP) install -r $(VENV)/extras.txt
SOURCES := setup.py pyproject.toml $(shell find pyx snapengine -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

# Snapshots of attached processes per test case and round: 60 cases, so 1020.
ATTACH_CUTS ?= 17
# Snapshots of each program of `make test-real` and mode.
REAL_SNAPSHOTS ?= 20
# Machines saved, killed and restored per test case and round.
QEMU_ROUNDS ?= 10

# Processes that `make test` spreads the test files over. Few tests use one CPU for long.
WORKERS ?= 2

# All targets together.
FUZZ_SECONDS ?= 240
# What AddressSanitizer runs: all that handles memory by address, of captures, restores and foreign input. And what
# ThreadSanitizer runs: the threads of captures. Each takes some minutes.
ADDRESS_TESTS ?= $(addprefix tests/test_,bitmap.py pool.py index.py rules.py capture.py target_killed.py freezer.py \
	prearm.py inject.py source.py stream_parser.py from_stream.py)
# What `make coverage` runs: tests of each room that need no QEMU.
COVERAGE_TESTS ?= $(addprefix tests/test_,arena.py bitmap.py capture.py capture_memory.py checksum.py cli.py \
	cli_output.py concurrency.py corruption.py descriptor.py doctor.py elf_core.py encoder.py decisions.py fd_writer.py \
	freezer.py golden.py guest.py guest_check.py guest_memory.py handover.py histogram.py image.py index.py from_stream.py \
	inject.py jobs.py latch.py layout.py listener.py message.py names.py own_memory.py pagemap.py pages.py permissions.py \
	pool.py prearm.py process.py process_lost.py procmaps.py procmaps_line.py record.py region_pack.py rules.py \
	scan_runs.py shared_mm.py sinks.py source.py stream_parser.py try_register.py uffd.py units.py workers.py writer.py zstd_auto.py)
THREAD_TESTS ?= $(addprefix tests/test_,pool.py capture.py prearm.py guest_memory.py stream_parser.py from_stream.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help:  ## Print this message
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: $(VENV)/.base  ## Save a busy guest live by both methods; print a table, draw demo.png
	$(BIN)/snapengine demo --plot demo.png $(DEMO)

.PHONY: test
test: $(VENV)/.test  ## Run the tests, file by file in WORKERS (2) processes
	$(BIN)/python -m pytest -q $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile) $(TESTS)

.PHONY: test-real
test-real: $(VENV)/.test  ## Save servers and runtimes under load, also the large ones, REAL_SNAPSHOTS (20) times
	REAL_ALL=1 REAL_SNAPSHOTS=$(REAL_SNAPSHOTS) $(BIN)/python -m pytest -q -rs -o faulthandler_timeout=2400 tests/real $(TESTS)

.PHONY: lint
lint: $(VENV)/.lint  ## ruff, mypy, cython-lint, and no hidden GIL checks in nogil code
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint --max-line-length 110 pyx snapengine tests bench examples
	PATH="$(abspath $(BIN)):$$PATH" .ci/cython-hints

.PHONY: bench
bench: $(VENV)/.bench  ## Measure (8 minutes), one table; writes build/bench.json and build/bench/*.png
	@mkdir -p build/bench
	$(BIN)/python bench/setup_floors.py
	$(BIN)/python -m pytest -q bench --benchmark-quiet --benchmark-json=build/bench.json $(BENCH)
	$(BIN)/python bench/plots.py
	@$(BIN)/python bench/report.py build/bench.json

.PHONY: bench-history
bench-history: $(VENV)/.bench  ## Keep what `make bench` measured in bench/history/, as NAME
	@$(BIN)/python bench/history.py add "$(NAME)"

.PHONY: bench-qemu
bench-qemu: $(VENV)/.bench  ## Measure machines of QEMU (8 minutes); writes build/bench-qemu.json and build/bench/qemu-*.png
	@mkdir -p build/bench
	$(BIN)/python -m pytest -q bench/bench_qemu.py --benchmark-quiet \
		--benchmark-json=build/bench-qemu.json $(BENCH)
	@$(BIN)/python bench/qemu_plots.py
	@$(BIN)/python bench/report.py build/bench-qemu.json

.PHONY: bench-peers
bench-peers: $(VENV)/.bench  ## Measure against fork and loops of QEMU's and forkd's shape (3 minutes); writes build/bench-peers.json
	@mkdir -p build/bench
	$(BIN)/python -m pytest -q bench/bench_peers.py --benchmark-quiet \
		--benchmark-json=build/bench-peers.json $(BENCH)
	@$(BIN)/python bench/report.py build/bench-peers.json

.PHONY: fuzz
fuzz: $(VENV)/.fuzz  ## Fuzz all that reads foreign input, for FUZZ_SECONDS (240) in all; FUZZ names single targets
	.ci/fuzz $(BIN)/python $(FUZZ_SECONDS) $(FUZZ)

.PHONY: asan
asan: $(VENV)/.test  ## Run tests with AddressSanitizer and UndefinedBehaviorSanitizer (built into build/)
	.ci/sanitize address $(BIN)/python $(or $(TESTS),$(ADDRESS_TESTS))

.PHONY: tsan
tsan: $(VENV)/.test  ## Run tests with ThreadSanitizer (built into build/)
	.ci/sanitize thread $(BIN)/python $(or $(TESTS),$(THREAD_TESTS))

.PHONY: coverage
coverage: $(VENV)/.coverage  ## Run tests and report the lines of Python and Cython that they reach (built into build/)
	.ci/coverage $(BIN)/python $(or $(TESTS),$(COVERAGE_TESTS))

.PHONY: soak
soak: $(VENV)/.test  ## Repeat the tests until one fails or MINUTES (10) have passed
	ATTACH_CUTS=$(ATTACH_CUTS) QEMU_ROUNDS=$(QEMU_ROUNDS) .ci/soak $(BIN)/python

.PHONY: docs
docs: $(VENV)/.docs  ## Build the documentation into build/docs; a warning or a broken internal link fails it
	$(BIN)/python -m sphinx -q -W --keep-going -d build/docs-doctrees docs build/docs
	@echo "build/docs/index.html"

.PHONY: man
man: $(VENV)/.docs  ## Build the manual page into build/man
	$(BIN)/python -m sphinx -q -b man -d build/docs-doctrees docs build/man
	@echo "build/man/snapengine.1"

.PHONY: dist
dist: $(VENV)/.test  ## Build the sdist, and from it the wheel, into dist/
	.ci/dist $(BIN)/python dist

.PHONY: check-dist
check-dist: dist  ## Install the wheel into a clean environment without the sources, and try it there
	.ci/check-dist $(PYTHON) dist

.PHONY: build
build: $(VENV)/.base  ## Set up .venv with the extension modules built in place

.PHONY: clean
clean:  ## Remove .venv and everything that was built
	find snapengine \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

.PHONY: tools
tools:
	@.ci/check-tools $(PYTHON)

# One stamp per layer, so that `make demo` of a fresh clone installs neither test nor lint tools.
$(VENV)/.created: pyproject.toml | tools
	@echo "setting up $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		> $(VENV)/build-requires.txt
	@$(PIP) install -r $(VENV)/build-requires.txt
	@touch $@

$(VENV)/.base: $(VENV)/.created $(SOURCES)
	@echo "installing snapengine into $(VENV) (compiles the extension modules: a minute or two)"
	@$(INSTALL) '.[plot]'
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "installing the test tools (nothing is compiled again)"
	$(call EXTRAS,plot test)
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@echo "installing the fuzzer (nothing is compiled again)"
	$(call EXTRAS,fuzz)
	@touch $@

$(VENV)/.coverage: $(VENV)/.test
	@echo "installing the coverage tools (nothing is compiled again)"
	$(call EXTRAS,coverage)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "installing the bench tools (nothing is compiled again)"
	$(call EXTRAS,bench)
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "installing the documentation tools (nothing is compiled again)"
	$(call EXTRAS,docs)
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	@echo "installing the lint tools (nothing is compiled again)"
	$(call EXTRAS,lint)
	@touch $@
