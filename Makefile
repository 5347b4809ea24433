# make demo       environment, install, then the whole job on the embedded lab model
# make test       everything CI checks
# make matrix     the tests that meet transformers most, with 5 and then with 4.57, each in an environment of its own (SLOW=1: all notebooks and tests);
#                 then make versions
# make versions   Python 3.10 to 3.13 with the oldest and newest torch and transformers, run-time requirements alone (CELLS=3.11/oldest/newest: one of them)
# make soak       every reader is fed 2 x FUZZ (1,000) spoilt files, runs are killed at every moment (FUZZ below 1,000: at every 17th), and every family
#                 meets the invariants; what was done goes into figures/bad_input, but for replays, devices, records and the class
# make dist       a source distribution and a wheel in dist/, and the wheel tried in an environment of its own (asks PyPI)
# make audit      known faults and licences of what is installed, by tools in a folder that is thrown away (asks PyPI)
# make notebooks  execute every notebook in order and keep the outputs (slow and gpu cells are skipped)
# make readme     README.md from nbs/index.ipynb; from the modules the stubs for type checkers, the list of methods and the known names
# make lab        JupyterLab on chapter 0
# make slides     build/slides.html: title, equation, picture and summary of each chapter, in one file
# make class      build/class: the chapters for students, with cells to fill and checks, without outputs and solutions (CLASS=FOLDER)
# make docs       the site, _docs/html/index.html, from the notebooks as they are executed, and a walk through it in Chromium (check-docs)
# make benchmarks measure what figures/benchmarks does not hold yet (hours, on an idle machine; LARGE=1: the 16 GB checkpoint too)
# make gpu        what wants a CUDA device, measured within a limit of 20 minutes and kept in figures/benchmarks/gpu.json (DRY=1: tried small, on the processor)
#
# With a virtual environment active, it is used; otherwise .venv is made here. Variables: PYTHON (which interpreter makes .venv),
# DEMO (the demo's run folder), CLASS. The matrix has 4.57 in .venv-457, which it makes the first time.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test soak dist audit matrix versions matrix-here notebooks lab slides class benchmarks gpu readme docs check-docs check-sync check-style check-notebooks check-pytest check-some check-transformers

PYTHON ?= python3
DEMO ?= runs/demo
CLASS ?= build/class
FUZZ ?= 1000
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.cap_nb-installed
# The two environments of the matrix, what each must hold, and the tests that both run.
MATRIX_NEW := transformers>=5,<6
MATRIX_OLD := transformers>=4.57,<4.58
MATRIX_OLD_VENV := $(CURDIR)/.venv-457
MATRIX_TESTS := families replay scoring streaming evaluation
KATEX := katex@~0.19.1 # Renders the site's formulas while it is built
SOAKING = CAP_NB_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 MPLBACKEND=Agg "$(BIN)/python" -m pytest
# A process that ends without pytest's summary has not done its tests, whatever its exit code.
COUNTED = | tee /dev/stderr | grep -qE '^=+ .*[0-9]+ passed.* in [0-9.]+s'
PINNED := # What is installed beyond what settings.ini asks for; the matrix sets it
# An environment that serves another checkout of this project is installed into again.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
$(shell rm -f "$(STAMP)")
endif
# CI may run as another user than the one who cloned.
GIT := git -c safe.directory=$(CURDIR)
RIGHT_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
  f'cap_nb needs Python 3.10 to 3.13, and {sys.executable} is {v[0]}.{v[1]}: name another one, for example: make demo PYTHON=python3.11')

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

env: $(STAMP)

# Compiling all that is installed takes a core most of a minute, and little of it is ever imported: Python compiles that itself, if it may keep it.
$(STAMP): settings.ini setup.py
	@if [ ! -x "$(BIN)/python" ]; then \
	  command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is not there: name an interpreter, for example: make demo PYTHON=python3.11" >&2; exit 1; }; \
	  "$(PYTHON)" -c "$(RIGHT_PYTHON)"; \
	  echo "Making the environment $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; \
	fi
	@"$(BIN)/python" -c "$(RIGHT_PYTHON)"
	@echo "Installing cap_nb and what it needs into $(VENV) (a few minutes the first time)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile) -e '.[dev]' $(if $(PINNED),'$(PINNED)')
	@printf '%s' "$(CURDIR)" > "$(STAMP)"

demo: env
	"$(BIN)/cap" run --model lab --out "$(DEMO)"

notebooks: env
	"$(BIN)/python" tools/notebooks.py
	"$(BIN)/nbdev_export"
	"$(BIN)/nbdev_clean"

# The 16 GB checkpoint, and the small files that are made of it, are left out unless they are asked for. The layer problem is compared with
# published code where CAP_NB_PEER names its folder.
benchmarks: env
	for each in start scoring scaling processes threshold generation layer_problem $(if $(LARGE),streaming); do "$(BIN)/python" -m "tools.benchmarks.$$each"; done

# A case that is on disk is not measured again, so a machine that was lent for minutes can go on later.
gpu: env
	"$(BIN)/python" -m tools.benchmarks.gpu $(if $(DRY),--dry-run)

soak: env
	$(SOAKING) tests/test_readers.py $(COUNTED)
	$(SOAKING) tests/faults $(COUNTED)
	$(SOAKING) tests/test_invariants.py $(COUNTED)
	CAP_NB_SOAK=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 MPLBACKEND=Agg "$(BIN)/python" -m pytest tests/test_replay.py tests/test_devices.py tests/test_records.py tests/test_teaching.py $(COUNTED)

# What is published is tried as a stranger gets it: the wheel alone, and what it asks for.
dist: env
	@rm -rf dist && "$(BIN)/python" -m build --outdir dist . > /dev/null
	@trial="$$(mktemp -d)"; trap 'rm -rf "$$trial"' EXIT; \
	"$(BIN)/python" -m venv "$$trial/venv"; "$$trial/venv/bin/python" -m pip install --quiet --disable-pip-version-check dist/*.whl; \
	cd "$$trial" && venv/bin/cap --version && venv/bin/cap run --model lab --methods cap --sparsity 0.5 --n 4 --evaluate-n 4 --loss-n 4 --windows 1 --out run
	@ls -l dist

# The tools come into an environment of their own, and look at the project's from outside. Strict: what could not be looked up is no success.
audit: env
	@tools="$$(mktemp -d)"; trap 'rm -rf "$$tools"' EXIT; \
	"$(BIN)/python" -m venv "$$tools/venv"; "$$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit pip-licenses; \
	echo "== licences"; "$$tools/venv/bin/pip-licenses" --python "$(BIN)/python" --order license; \
	echo "== known faults"; "$(BIN)/python" -m pip freeze --exclude-editable | grep '==' | sed 's/+[a-z0-9.]*//' > "$$tools/installed.txt"; \
	"$$tools/venv/bin/pip-audit" --strict --no-deps --disable-pip -r "$$tools/installed.txt"

readme: env
	"$(BIN)/python" tools/stubs.py

lab: env
	"$(BIN)/jupyter" lab nbs/00_calibration.ipynb

slides: env
	"$(BIN)/python" tools/slides.py

class: env
	"$(BIN)/python" -m tools.classroom --out "$(CLASS)"

# The sources are laid out, Sphinx builds them, and a warning fails; outputs are the committed ones.
docs: env
	@command -v npm >/dev/null || { echo "The site's formulas are rendered by KaTeX, which npm brings: install Node.js and npm" >&2; exit 1; }
	@"$(BIN)/python" -c "import myst_nb, sphinx_book_theme, playwright" 2>/dev/null || "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	@mkdir -p _docs/node && npm install --prefix _docs/node --silent --no-audit --no-fund --no-save "$(strip $(KATEX))"
	@rm -rf _docs/extra _docs/doctrees _docs/html
	"$(BIN)/python" tools/site/stage.py
	"$(BIN)/python" -m sphinx -q -W -n --keep-going -b html -c tools/site -d _docs/doctrees _docs/source _docs/html
	@$(MAKE) --no-print-directory check-docs

check-docs: env
	"$(BIN)/python" tools/site/walk.py

# The four checks run in this order; pytest's summary is the last thing printed.
test: env
	@$(MAKE) --no-print-directory check-sync
	@$(MAKE) --no-print-directory check-style
	@$(MAKE) --no-print-directory check-notebooks
	@$(MAKE) --no-print-directory check-pytest

# The second environment is tried also when the first one fails; a line on each closes the matrix, with pytest's own summary.
matrix:
	@log="$$(mktemp)"; trap 'rm -f "$$log"' EXIT; said="== matrix"; failed=0; \
	for each in "$(VENV)|$(MATRIX_NEW)" "$(MATRIX_OLD_VENV)|$(MATRIX_OLD)"; do \
	  $(MAKE) --no-print-directory matrix-here VENV="$${each%|*}" PINNED="$${each#*|}" 2>&1 | tee "$$log" && verdict=passed || { verdict=FAILED; failed=1; }; \
	  said+=$$'\n'"$$verdict: $$(sed -n 's/^== with //p' "$$log"), $$(sed -nE 's/^=+ (.* in [0-9.]+s.*) =+$$/\1/p' "$$log" | tail -n 1)"; \
	done; $(MAKE) --no-print-directory versions || failed=1; echo "$$said"; exit $$failed

versions: env
	"$(BIN)/python" tools/matrix.py $(CELLS)

matrix-here: env check-transformers $(if $(SLOW),check-notebooks check-pytest,check-some)

# An environment that holds another transformers is not mended: someone may want it so.
check-transformers: env
	@"$(BIN)/python" -c 'import sys, transformers as t; from packaging.requirements import Requirement; wanted = Requirement(sys.argv[1]); \
	  print(f"== with transformers {t.__version__} in {sys.argv[2]}", flush=True); \
	  sys.exit(None if t.__version__ in wanted.specifier else f"{wanted} is wanted there: remove that environment, or install it there")' "$(PINNED)" "$(notdir $(VENV))"

check-some: env
	CAP_NB_SOAK=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 MPLBACKEND=Agg "$(BIN)/python" -m pytest $(MATRIX_TESTS:%=tests/test_%.py)

check-sync: env
	@echo "== notebooks and modules in step"
	"$(BIN)/nbdev_export"
	"$(BIN)/nbdev_clean"
	@$(GIT) --no-pager diff --exit-code --stat -- nbs cap_nb || { echo "The notebooks, exported and cleaned, differ from what is committed: edit notebooks only, run nbdev_export and nbdev_clean, commit both." >&2; exit 1; }
	@untracked="$$($(GIT) status --porcelain -- nbs cap_nb)"; [ -z "$$untracked" ] || { echo "Not committed under nbs or cap_nb:" >&2; echo "$$untracked" >&2; exit 1; }

check-style: env
	@echo "== style of notebooks and modules"
	"$(BIN)/ruff" check --quiet nbs
	"$(BIN)/ruff" check --quiet --ignore E501 cap_nb # nbdev wraps __all__ as it likes; the other lines are the notebooks'

check-notebooks: env
	@echo "== notebooks run"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 MPLBACKEND=Agg "$(BIN)/python" tools/check_notebooks.py

check-pytest: env
	@echo "== pytest"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 MPLBACKEND=Agg "$(BIN)/python" -m pytest -n 2 --dist worksteal --durations=15
