# make demo       run every finished kit on its generated set and show its result table
# make test       checks and the quick tests
# make test-full  checks and all tests, slow ones included; FITKIT_DEEPPCB=DIR adds those on the published boards
# make check      ruff and mypy
#
# The first run makes .venv and installs into it. Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
BIN := .venv/bin
KITS := pcb_inspection mobile_diffusion bev_perception

.DELETE_ON_ERROR:
.PHONY: demo test test-full check

demo: $(KITS:%=demo-%)

# Exit status 1 with a report means that a gate failed: a result of the run, which the table shows, not a breakdown.
demo-%: .venv/.done
	rm -rf runs/demo/$*
	$(BIN)/fitkit run $* --preset smoke --out runs/demo/$* || { test $$? -eq 1 && test -f runs/demo/$*/report.json; }
	@echo "$*: open runs/demo/$*/report.html"

test: check
	$(BIN)/python -m pytest -m "not slow and not real_data"

test-full: check
	$(BIN)/python -m pytest

check: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.done: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "fitkit: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fitkit: needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "fitkit: installing into .venv; the first time this fetches several GB (torch above all) and takes some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@
