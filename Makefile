# make demo      the whole chain in a browser, on 127.0.0.1:7860   (make demo ARGS="--port 8000")
# make quick     lint, types and the fast tests                    (make quick ARGS="-k tokenizer")
# make test      lint, types, the site of docs/ and all tests      (make test ARGS="-k tokenizer")
# make coverage  all tests, with the branches that they miss, and docs/coverage.md
# make mutants   changes the source, and sees whether a test notices (hours; goes on where it was stopped)
# make chaos     kills commands at random moments, and sees whether they go on (half an hour; goes on where it was stopped)
# make types     types alone
# make docs      the site of docs/, in site/
# All create .venv and install into it once; again only when a requirement changed.

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(USABLE)' 2>/dev/null && echo $(p))))
NO_PYTHON := error: found no Python 3.11 or newer with venv; install one \
  (Debian, Ubuntu: sudo apt-get install python3 python3-venv; macOS: brew install python@3.12) \
  or name it: make demo PYTHON=/path/to/python3
SOURCES := pyproject.toml constraints.txt install.py

# Lists are joined by `;`: under `set -e` the shell goes on after a failure on the left of `&&`.
LINT := .venv/bin/python -m ruff check .; .venv/bin/python -m ruff format --check .
TYPES := .venv/bin/python .ci/typecheck.py
DOCS := .venv/bin/python .ci/link_tree.py; NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo auto)  # that this process may use; pytest counts all
TESTS := pytest --numprocesses $(strip $(CORES)) --maxprocesses 4 --dist loadfile
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m $(TESTS)
COVERAGE := .venv/bin/python -m coverage
TIMED = set -e; start=$$(date +%s); trap 'echo "make $@ took $$(($$(date +%s) - start)) s"' EXIT

.PHONY: demo quick test coverage mutants chaos types docs
.DELETE_ON_ERROR:

demo: .venv/installed-demo
	.venv/bin/python app/demo.py $(ARGS)

quick: .venv/installed-test
	@$(TIMED); $(LINT); $(TYPES); $(PYTEST) -m "not slow" $(ARGS)

test: .venv/installed-test
	@$(TIMED); $(LINT); $(TYPES); $(DOCS); $(PYTEST) $(ARGS)

coverage: .venv/installed-test
	@$(TIMED); OMP_NUM_THREADS=1 $(COVERAGE) run -m $(TESTS) $(ARGS); \
	  $(COVERAGE) combine --quiet; $(COVERAGE) report; .venv/bin/python .ci/coverage_page.py

mutants: .venv/installed-mutants
	.venv/bin/python .ci/mutants.py $(ARGS)

chaos: .venv/installed-test
	.venv/bin/python benchmarks/chaos.py $(ARGS)

types: .venv/installed-test
	@$(TIMED); $(TYPES)

docs: .venv/installed-test
	@$(TIMED); $(DOCS)

.venv/installed-demo: EXTRAS := app
.venv/installed-test: EXTRAS := app,eval,data,remote,scale,dev,docs
.venv/installed-mutants: EXTRAS := app,eval,data,remote,scale,dev,docs,mutants
.venv/installed-demo .venv/installed-test .venv/installed-mutants: $(SOURCES)
	@python="$(PYTHON)"; [ -n "$$python" ] || { echo "$(NO_PYTHON)" >&2; exit 2; }; \
	  "$$python" install.py $(EXTRAS)
	@touch $@
