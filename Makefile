# The two main commands: `make test` runs the tests, `make demo` loads full-size models of every library and compares
# embeddings. Every command first creates .venv if it is missing; the packages take some minutes.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

.PHONY: demo test check-format coverage coverage-page lint types mappings docs bench clean

demo: $(DONE)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/demo.py

PROOFS := build/proofs.json

test: $(DONE)
	rm -f $(PROOFS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal --proofs=$(PROOFS)

# One format in under a minute: `make check-format NAME=hf_clip` checks its mapping, then runs its tests without the
# slow ones.
check-format: $(DONE)
	@test -n "$(NAME)" || { echo "name a format: make check-format NAME=hf_clip"; exit 2; }
	@test -n "$(wildcard mappings/*/$(NAME).yaml mappings/$(NAME).yaml)" || $(BIN)/python -m pytest --collect-only tests/formats/test_ownership.py --format=$(NAME)
	$(BIN)/python tools/check_mappings.py $(wildcard mappings/*/$(NAME).yaml mappings/$(NAME).yaml)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/formats --format=$(NAME) -m "not slow"

# Compare docs/coverage.md with what the last `make test` proved: a stale page or a worse cell fails. `coverage-page`
# writes the page.
coverage: $(DONE)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/make_coverage.py --proofs $(PROOFS) --check

coverage-page: $(DONE)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/make_coverage.py --proofs=$(PROOFS)

lint: $(DONE)
	$(BIN)/ruff check keymap tests tools
	$(BIN)/ruff format --check keymap tests tools

types: $(DONE)
	$(BIN)/mypy

mappings: $(DONE)
	$(BIN)/python tools/check_mappings.py
	$(BIN)/python tools/make_docs.py --check

docs: $(DONE)
	$(BIN)/python tools/make_docs.py

bench: $(DONE)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench.py

# openai-clip needs the pkg_resources of an older setuptools than torch asks for; nothing else is affected.
# cn-clip pins an lmdb that its models do not import; six is what they import. The others ask for packages that download,
# tokenize or compile, which their models do not use (tests/peers/stubs.py, tests/peers/language_models.py).
$(DONE): pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1,<26"
	$(BIN)/pip install --quiet --constraint tools/constraints.txt --editable . --group peers --group dev
	$(BIN)/pip install --quiet --no-deps "setuptools==69.5.1" "openai-clip==1.0.1" "cn-clip==1.6.0" "six==1.17.0" \
	  "pytorch-pretrained-bert==0.3.0" "openai-whisper==20250625" "segment-anything==1.0" \
	  "torchtune==0.6.1" "torchtitan==0.3.0" "llama-models==0.3.0"
	touch $(DONE)

clean:
	rm -rf $(VENV) build
