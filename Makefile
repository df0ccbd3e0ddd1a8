# make demo: one whole chain, from a download to ROUGE.   make test: the whole suite.   Both make .venv themselves.
# make test-fast: what is not slow, in under 5 minutes.   make lint: style and types.   make reference: docs/reference/.
# make release-check [TEST=test-fast]: a wheel in an empty environment, demo and tests with it; an hour.
# make fuzz [CASES=20000] [SEED=1]: damaged inputs at random; make fuzz CASE=...: one of them again (docs/reliability.md).
# Linux wheels of torch on PyPI hold CUDA; for the small CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
DEMO := results/smollm2-135m
# Tests start hundreds of Pythons, and each would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast fuzz lint reference release-check clean

# The environment begins anew where another Python made it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = (*map(int, '$(OLDEST)'.split('.')),); sys.version_info >= v or sys.exit('error: \
	$(PYTHON) is Python %d.%d, too old; call make with $(OLDEST) or later: make PYTHON=python3.12' % sys.version_info[:2])"
	$(PYTHON) -m venv $$(test "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V)" || echo --clear) .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[workflow,cluster,tensorrt-rtx,mpi,lm-eval,test]'
	touch $@

demo: .venv/installed
	$(BIN)/snakemake $(DEMO)/fp16/rouge.json $(DEMO)/hf/rouge.json
	$(BIN)/trtbuild score --summaries $(DEMO)/fp16/summaries.jsonl --baseline $(DEMO)/hf/rouge.json

test: test-fast
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not gpu"

test-fast: .venv/installed
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

fuzz: .venv/installed
	$(BIN)/python tests/fuzz CASES='$(CASES)' SEED='$(SEED)' ONLY='$(ONLY)' CASE='$(CASE)'

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/snakemake --lint

reference: .venv/installed
	$(BIN)/python docs/reference/make.py

release-check:
	PYTHON='$(PYTHON)' TEST='$(TEST)' tests/release_check.sh

clean:
	rm -rf results/*/ .snakemake
