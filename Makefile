# make test       install what is missing, then linters and every test that needs no GPU
# make test-fast  the same without the slow tests
# make test-gpu   the tests that need a GPU, and vLLM's, each engine in a process of its own
# make campaign   the fault campaign (docs/reliability.md), under half an hour; CAMPAIGN_SEED=7 CAMPAIGN_SCALE=2 ARGS="-k kills"
# make gpu        measure this GPU (benchmarks/gpu); ARGS="--part a", ARGS="--shape tiny" without a GPU
# make bench      ours against plain and stock on this CPU, under 10 minutes (benchmarks/); ARGS="score step" for some
# make newest     every test with the newest packages that pyproject.toml allows, in an environment of its own; ARGS="tests/test_X.py"
PYTHON ?= python3
VENV := .venv/bin

.PHONY: install lint test test-fast test-gpu campaign gpu bench newest

install:
	$(PYTHON) scripts/setup_env.py --dev

lint: install
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/lint-imports

test: lint
	$(VENV)/python -m pytest -m "not gpu and not long"

test-fast: lint
	$(VENV)/python -m pytest

test-gpu: install
	$(VENV)/python -m pytest -m "gpu or engine"

campaign: install
	$(VENV)/python -m pytest -n 0 -m campaign tests/campaign $(ARGS)

gpu: install
	$(VENV)/python -m benchmarks.gpu $(ARGS)

bench: install
	$(VENV)/python -m benchmarks $(ARGS)

newest:
	$(PYTHON) scripts/newest.py $(ARGS)
