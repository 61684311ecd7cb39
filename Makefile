# make train: environment, installation and a real run.  make test: the same environment and every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install train test test-slow lint browser bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install
	$(BIN)/python train.py experiment=tiny

test: install lint browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what takes many minutes and `make test` leaves out: 50 kills, 200 damaged checkpoints
test-slow: install
	$(BIN)/python -m pytest -m slow

# Chromium for the tests of the chat page; without one they are skipped, but not in CI
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null \
		|| { apt-get update -qq && apt-get install -y -qq chromium; } || test -z "$$CI"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/nanochat bench step
	$(BIN)/nanochat bench loss

clean:
	rm -rf $(VENV) build dist *.egg-info
