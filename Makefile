# make setup      .venv with everything, at the tested versions (at once when nothing changed)
# make demo       the starter answers questions about a picture and draws where it looked
# make test       everything that is not slow
# make test-slow  the rest: trainings that are killed and resumed, two processes, a browser
# make chromium   the browser of the tests, where it may be installed (as root, with apt-get)
# make test-gpu   what needs a CUDA device
# make compare    a reduced comparison at equal budget (under 30 minutes on 2 cores)
# make bench      the benchmarks, their results, and the documents that show them (19 minutes on 2 cores)
# make bench-gpu  the same on a CUDA device
# make torture    what must never break, tried widely and counted for docs/reliability.md
#                 (under 20 minutes on 2 cores; SCALE=0.05 tries a part and writes no document;
#                 SECTIONS="inputs numbers" for some of it)
# make lint       ruff and mypy
# make audit      ask a database of vulnerabilities about every package of the tested set
#                 (STRICT=1 fails where none answers)
# make release-check  wheels and sdists built, looked into, installed where nothing else is, and tested
#                 there; Python 3.12 and 3.13 without torch (PART=short: in a minute or so;
#                 STRICT=1 fails where one of these Pythons is not installed, but for short)
# make lock       write the hashes of the tested set anew, after a change of requirements.txt
# make docs       the documentation site, in build/site; make docs-serve shows it while you write
#
# Another Python: make setup PYTHON=python3.12
# A trial of the benchmarks that touches no document:
#   make bench RESULTS=/tmp/trial BENCH="--grid short --row-seconds 0.02 --no-check"

PYTHON ?= python3
RESULTS ?= benchmarks/results
BENCH ?=
PART ?= whole
SCALE ?= 1
SECTIONS ?=
STRICT ?=
BIN := .venv/bin
STAMP := .venv/.installed
DOCS := .venv-docs
TOOLS := .venv/tools/bin
TOOLS_STAMP := .venv/tools/.installed
PIP_INSTALL := -m pip install --disable-pip-version-check
HASHED := --require-hashes --no-deps --only-binary :all:
MEMBERS := $(wildcard plugins/*/pyproject.toml backbones/*/pyproject.toml)

.DEFAULT_GOAL := setup
.PHONY: setup demo test test-slow test-gpu chromium compare bench bench-gpu torture lint audit lock release-check \
  docs docs-serve cuda

setup: $(STAMP)

$(STAMP): requirements.txt requirements.lock pyproject.toml $(MEMBERS)
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "IPN needs Python 3.11 or newer, and there is no '$(PYTHON)' here." \
	    "Install one, or name it: make setup PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "IPN needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another one: make setup PYTHON=python3.11" % v[:2])'
	"$(PYTHON)" -m venv .venv
	$(BIN)/python $(PIP_INSTALL) $(HASHED) -r requirements.lock
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation -r requirements.txt
	@$(BIN)/python -m pip check
	@touch $@

# For what is no part of IPN, so that none of it can change what is tested.
$(TOOLS_STAMP): release/tools.lock $(STAMP)
	"$(PYTHON)" -m venv .venv/tools
	$(TOOLS)/python $(PIP_INSTALL) --quiet $(HASHED) -r $<
	@touch $@

demo: $(STAMP)
	@$(BIN)/ipn models pull starter
	$(BIN)/ipn ask examples/scene.png "Is there a dog?"
	$(BIN)/ipn ask examples/scene.png "What is in row 3, column 3?"
	$(BIN)/ipn ask examples/scene.png "Which row is the dog in?" --heatmap heatmap.png

test: $(STAMP)
	@$(BIN)/ipn models pull smollm2-135m-instruct
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# The tests of the web page say that they are skipped where there is none.
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  export DEBIAN_FRONTEND=noninteractive && \
	  { timeout 300 apt-get install -y --no-install-recommends chromium || \
	    { timeout 120 apt-get update && \
	      timeout 300 apt-get install -y --no-install-recommends chromium; }; } \
	  >/dev/null 2>&1; } || echo "no chromium here, and none that may be installed"

test-slow: $(STAMP) chromium
	@$(BIN)/ipn models pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: cuda
	$(BIN)/python -m pytest -m gpu

compare: $(STAMP)
	@$(BIN)/ipn models pull smollm2-135m-instruct
	$(BIN)/ipn compare examples/compare.yaml --arms static --seeds 1 --out runs/compare-reduced --resume \
	  sweep=null data.0.options="{scenes: 1000}" data.1.limit=3000

# The documents are filled also where a benchmark fails: its row says so.
MEASURE = $(BIN)/python -m pytest benchmarks --benchmark-quiet --timeout 7200 --results $(RESULTS)
RENDER = status=$$?; $(BIN)/python -m benchmarks.render --results $(RESULTS) && exit $$status

bench: $(STAMP)
	@$(BIN)/ipn models pull smollm2-135m-instruct
	$(MEASURE) -m "not gpu" $(BENCH); $(RENDER)

bench-gpu: cuda
	$(MEASURE) -m gpu $(BENCH); $(RENDER)

# All of it together, where there is such a command: pytest bounds each test alone.
BOUNDED := $(if $(shell command -v timeout),timeout --kill-after 20 1200)
TORTURES = $(or $(patsubst %,torture/torture_%.py,$(SECTIONS)),torture)

torture: $(STAMP)
	@$(BIN)/ipn models pull smollm2-135m-instruct
ifeq ($(SCALE),1)
	$(BOUNDED) $(BIN)/python -m pytest $(TORTURES) -q --timeout 600; status=$$?; \
	  $(BIN)/python -m torture.render && exit $$status
else
	$(BOUNDED) $(BIN)/python -m pytest $(TORTURES) -q --timeout 600 --scale $(SCALE) \
	  --counts build/torture.json
endif

# What the targets for a GPU need, so that they need nothing else.
cuda: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	  "torch %s sees no CUDA device. This needs one, its driver, and a torch built for CUDA in .venv: " \
	  "see the selector on pytorch.org for the command that installs it." % torch.__version__)'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[cuda]"
	@$(BIN)/ipn models pull smollm2-135m-instruct

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(TOOLS_STAMP)
	@$(BIN)/python -m release.audit --pip-audit $(TOOLS)/pip-audit $(if $(STRICT),--strict)

# The models must be there, for the tests that ask them from the wheels.
release-check: $(TOOLS_STAMP)
	@$(BIN)/ipn models pull smollm2-135m-instruct
	$(TOOLS)/python -m release.check --part $(PART) $(if $(STRICT),--strict)

# For every platform and Python from 3.11 on. What is on no index is left out.
COMPILE = compile() { $(TOOLS)/uv pip compile --quiet --universal --python-version 3.11 \
  --generate-hashes --no-header --no-annotate --config-file release/torch.toml \
  --no-emit-package torch "$$@"; }; compile

lock: $(TOOLS_STAMP)
	grep -v '^-e ' requirements.txt | { $(COMPILE) - --output-file requirements.lock; } >/dev/null
	$(COMPILE) release/tools.txt --output-file release/tools.lock >/dev/null
	$(COMPILE) docs/making/requirements.txt --output-file docs/making/requirements.lock >/dev/null

# The site is made without the rest, in an environment of its own.
$(DOCS)/.installed: docs/making/requirements.lock
	"$(PYTHON)" -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) --quiet $(HASHED) -r $<
	@touch $@

# The variable keeps out what the theme says of other programs; warnings of mkdocs fail.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs serve --strict
