# Each target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
FREE = $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile
PIP = $(FREE) -c constraints.txt

.PHONY: help reproduce report test test-fast test-slow speed reliability notebooks readme docs clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One environment from pinned versions, made again only when they change; first what grids need, then all else.
$(RUNS): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) is what '$(PYTHON)' is. Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# pip would compile twenty thousand modules, for nearly two minutes; few are ever imported, and they are compiled then
	$(PIP) -e '.[runs]'
	@touch $@

$(READY): $(RUNS)
	$(PIP) -e '.[dev,docs]'
	@# an oracle of the tests; its own requirements bring a torchvision that is built for another torch
	$(PIP) --no-deps \
	  backpack-for-pytorch curvlinops-for-pytorch einconv linear-operator unfoldnd
	@# kept aside: transformers imports HQQ wherever it finds it, which takes two seconds of every start
	$(PIP) --no-deps --target $(VENV)/hqq hqq termcolor
	@# kept aside too, for tests of quantised bases and of TRL's trainer: transformers and PEFT import these wherever they find them
	$(PIP) --no-deps --target $(VENV)/extras bitsandbytes torchao trl || echo "without these, their tests are skipped"
	@touch $@

reproduce: $(RUNS) ## LoRA against DoRA on three tasks, from nothing to reports/quick/report.md
	$(BIN)/dora-nb run reports/quick/grid.toml
	$(BIN)/dora-nb report runs/quick --grid reports/quick/grid.toml --out reports/quick

report: $(READY) ## every page, table and figure in reports/ again, from the stored results
	$(BIN)/dora-nb report reports
	$(BIN)/python -m benchmarks.speed.report
	$(BIN)/python -m reports.rank.report
	$(BIN)/python -m reports.planted.planted report reports/planted/cells
	$(BIN)/python -m benchmarks.reliability.report

test: $(READY) ## everything that CI runs
	$(BIN)/python -m pytest tests -n 2 --dist worksteal

test-fast: $(READY) ## what takes a minute: no real model, no other process
	$(BIN)/python -m pytest tests -m 'not slow and not long' -n 2 --dist worksteal

test-slow: $(READY) ## faults at many moments, minutes each
	$(BIN)/python -m pytest tests -m slow

speed: $(READY) ## every benchmark, an hour and a half on two cores, and reports/speed/report.md
	$(FREE) --no-deps --target build/peers torchtune==0.6.1 torchao==0.13.0 omegaconf antlr4-python3-runtime==4.9.3 \
	  tiktoken blobfile kagglehub sentencepiece
	for name in step where roofline compile memory train evaluate inference scales growth curvature \
	  "peers --torchtune build/peers"; do \
	  $(BIN)/python -W ignore -m benchmarks.speed.$$name --out reports/speed/$${name%% *}.json || exit 1; done
	$(BIN)/python -m benchmarks.speed.report

reliability: $(READY) ## every fault and attack, a real grid that is killed, a soak, an hour; and reports/reliability/report.md
	$(BIN)/python -m pytest tests -m 'slow or not slow' -k 'faults or team or train or assets' --junitxml reports/reliability/tests.xml
	$(BIN)/python -m pytest tests -m attack --junitxml reports/reliability/attacks.xml
	for name in faults soak; do \
	  $(BIN)/python -W ignore -m benchmarks.reliability.$$name --out reports/reliability/$$name.json || exit 1; done
	$(BIN)/python -m benchmarks.reliability.report reports/reliability/tests.xml reports/reliability/attacks.xml

notebooks: $(READY) ## format, export and clean: run after editing a notebook
	$(BIN)/ruff format -q nbs tests benchmarks reports setup.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

README := README.md
readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/python -m nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb | sed 's#](\.\./#](#g' | \
	  awk '/^```/ { if (!code && $$0 == "```") $$0 = "```python"; code = !code } { print }' > $(README).part
	mv $(README).part $(README)

docs: $(READY) ## the documentation site in _docs/, which needs no network
	$(BIN)/python nbs/_site/build.py _docs

clean: ## remove the environment and what was built (not the cache, not runs/)
	rm -rf $(VENV) _docs build dist *.egg-info
