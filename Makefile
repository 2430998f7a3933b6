# `make study` runs the whole study, `make test` the tests. Needs Python >= 3.11, make and pip, nothing else.
#   make study ARGS="--profile smoke"       options of `casa-mech run`
#   make test ARGS="-k gate"                options of pytest
#   make lint | docs | results | gallery | kills | clean
#   PYTHON=python3.12                       another interpreter for the virtual environment
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   take torch from another index (a CPU-only build, say)

PYTHON ?= python3
TORCH := torch==2.13.0
PIP_INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed


.PHONY: study test lint docs results gallery kills clean
.DELETE_ON_ERROR:

study: $(STAMP)
	$(BIN)/casa-mech run $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Kill -9 at twenty random moments of train, collect, compare and run each; what is left in the end is an unstopped run's.
kills: $(STAMP)
	CASA_MECH_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/project/test_kills.py -s -o timeout=0 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/; a broken link or a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# docs/results.md, from the committed figures' numbers; a test holds the two together.
results: $(STAMP)
	$(BIN)/python docs/make_results.py

# The committed figures: the default study's, the smoke profile's numbers that a test makes again, and audits of three gates each.
gallery: $(STAMP)
	$(BIN)/casa-mech run --out runs/gallery
	$(BIN)/casa-mech run --profile smoke --out runs/gallery-smoke
	mkdir -p figures/smoke
	cp runs/gallery/figures/* runs/gallery/manifest.json figures/
	cp runs/gallery-smoke/figures/*.csv runs/gallery-smoke/manifest.json figures/smoke/
	mkdir -p figures/audit_gates
	for model in organism organism-unasked; do for seed in 0 1 2; do \
	  one=runs/audits/$$model-$$seed; rm -rf $$one; \
	  $(BIN)/casa-mech train --model $$model --seed $$seed --out $$one/gate && \
	  $(BIN)/casa-mech audit --model $$model --gate $$one/gate --attacks plain,spelled,image,audio --n 100 --out $$one/audit && \
	  cp $$one/audit/effects.csv figures/audit_gates/$$model-$$seed.csv || exit 1; done; done
	$(BIN)/python docs/make_results.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "casa-mech needs Python 3.11 or newer, and '$(PYTHON)' is not: run 'make $(MAKECMDGOALS) PYTHON=python3.12', say" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_INDEX) --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
