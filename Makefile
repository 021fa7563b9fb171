# make demo   the whole chain in a browser, on 127.0.0.1:7860   (make demo ARGS="--port 8000")
# make test   lint, format check and tests                      (make test ARGS="-k tokenizer")
# Both create .venv and install into it once; again only when a requirement changed.

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(USABLE)' 2>/dev/null && echo $(p))))
NO_PYTHON := error: found no Python 3.11 or newer with venv; install one \
  (Debian, Ubuntu: sudo apt-get install python3 python3-venv; macOS: brew install python@3.12) \
  or name it: make demo PYTHON=/path/to/python3
SOURCES := pyproject.toml constraints.txt install.py

.PHONY: demo test types docs
.DELETE_ON_ERROR:

demo: .venv/installed-demo
	.venv/bin/python app/demo.py $(ARGS)

test: .venv/installed-test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest $(ARGS)

types: .venv/installed-test
	.venv/bin/python .ci/typecheck.py

docs: .venv/installed-test
	.venv/bin/python .ci/link_tree.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

.venv/installed-demo: EXTRAS := app
.venv/installed-test: EXTRAS := app,eval,dev,docs
.venv/installed-demo .venv/installed-test: $(SOURCES)
	@python="$(PYTHON)"; [ -n "$$python" ] || { echo "$(NO_PYTHON)" >&2; exit 2; }; \
	  "$$python" install.py $(EXTRAS)
	@touch $@
