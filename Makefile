# One command each; `make` lists them. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
QUICKSTART = .venv/bin/python -m jobs.run_pipeline --config jobs/configs/quickstart/pipeline.yaml
DEMO = .venv/bin/python -m jobs.run_pipeline --config jobs/configs/demo/pipeline.yaml
# With IMAGES=/some/folder a run has an output of its own, named after the folder.
with_images = $(if $(IMAGES),--images '$(IMAGES)' --output "runs/$(1)-$$(basename '$(IMAGES)')")

.PHONY: help quickstart demo quickstart-clean test test-slow test-chaos check bench lock

help: ## This list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 26

quickstart: .venv/.installed ## Every stage on drawn images, 8 minutes on 2 cores; IMAGES=/some/folder takes yours.
	$(QUICKSTART) $(call with_images,quickstart)

demo: .venv/.installed ## The same with half an hour of training; IMAGES=/some/folder takes yours.
	$(DEMO) $(call with_images,demo)

quickstart-clean: ## Removes what quickstart and demo wrote.
	rm -rf runs/quickstart runs/quickstart-* runs/demo runs/demo-*

test: .venv/.installed ## The tests that take seconds.
	.venv/bin/python -m pytest -m "not slow and not chaos" -n 2

test-slow: .venv/.installed ## The tests that take minutes.
	.venv/bin/python -m pytest -m slow

test-chaos: .venv/.installed ## Kills at every step, faulty stores: minutes.
	.venv/bin/python -m pytest -m chaos

check: .venv/.installed ## Format, lint, types, import directions.
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/python -m pytest -q tests/test_imports.py

bench: .venv/.installed ## Benchmarks that need no data: one line of JSON per case.
	for name in checkpoint scale; do .venv/bin/python -m "benchmarks.$$name" || exit 1; done

lock: ## Resolves pyproject.toml anew into requirements.lock; needs uv.
	( sed -n '/^#/p;/^#/!q' requirements.lock; \
	  uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --group dev pyproject.toml ) \
	  > requirements.lock.new
	mv requirements.lock.new requirements.lock

# An environment that is complete already is taken as it is after `touch .venv/.installed`.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or later; name one with PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --require-hashes -r requirements.lock
	.venv/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
