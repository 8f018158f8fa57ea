# Everything happens in .venv. `make run` is all a first visitor needs.
PYTHON ?= python3
TORCH ?= 2.13.0
MODELS := ckpt/official
BIN := .venv/bin
CLIENT := './services/client[cli,mcp]'
# The reference, for comparison: its commit is the one of pyproject.toml's extra. A folder will do as well.
HEARTLIB ?= $(shell sed -n 's/^heartlib = \["heartlib @ \(.*\)"\]$$/\1/p' pyproject.toml)
REFERENCE_VENV := .venv-reference
# There while everything that running, the tests or the reference need is installed.
RUN := .venv/.installed
DEV := .venv/.installed-dev

.PHONY: help install run demo test test-real test-reference chaos bench bench-flow bench-gateway bench-pairs bench-stream gpu \
	cluster browser screenshots check-images lint run-tests models train-demo evaluate-demo example clean unsound

help:
	@echo 'make run      install if needed, then start everything: web page, API, workers, NATS, object store'
	@echo 'make demo     let the running stack make a song, and save it here'
	@echo 'make test     lint and all tests, beside one another'
	@echo 'make test-real   the documentation with programs of others, as far as they are there: nats, aws, rclone, versitygw …'
	@echo 'make test-reference   the engines beside the reference, heartlib, in an environment of its own'
	@echo 'make lint     ruff, mypy, import-linter'
	@echo 'make chaos    songs on a real stack while its parts are killed: MINUTES=5, SEED=random'
	@echo 'make cluster  the same on three NATS nodes that are killed and cut off, then songs a second by pairs (needs root)'
	@echo 'make bench    what the engines cost: see docs/performance.md for BENCH, REFERENCE, BENCH_DEVICE and BENCH_INT8'
	@echo 'make gpu      on a machine with a CUDA card: the tests and the bench that need one, in eight minutes (docs/gpu.md)'
	@echo 'make bench-flow   what the system itself costs a song, with an engine that costs nothing'
	@echo 'make bench-gateway   what a POST and a thousand websockets cost the gateway'
	@echo 'make bench-stream   how soon a song can be heard, and without gaps? BASE=<its folder>: beside another checkout'
	@echo 'make bench-pairs   is this checkout slower than another anywhere? BASE=<its folder>, CASES=frame-float32-1'
	@echo 'make screenshots   pictures of the web page into docs/images (needs chromium)'
	@echo 'make check-images   install what the container images hold, in empty environments'
	@echo 'make models   fetch the official weights (22 GB) into $(MODELS); with ENCODER=1 what recordings need (2 GB) too'
	@echo 'make train-demo   train ckpt/demo anew: two hours on two cores; interrupted, it goes on where it was'
	@echo 'make evaluate-demo   how well the demo follows tags and lyrics, how near its sound is, what is read in recordings'
	@echo 'make example  render docs/example.ogg and its spectrogram with ckpt/demo'
	@echo 'make clean    remove what was built; .venv, data and ckpt stay'

install: $(RUN)

# An environment whose first installation was interrupted, whose Python is gone or that was moved is made anew.
SOUND := $(shell ! test -e .venv/.incomplete && { \
	if test -e $(RUN); then $(BIN)/python -I -c 'import os, shared; os.path.samefile(*shared.__path__, "shared") or exit(1)'; \
	else $(BIN)/python -I -c 'import pip'; fi; } 2>/dev/null && echo yes)

unsound:
	@rm -rf .venv

$(RUN): pyproject.toml services/client/pyproject.toml constraints.txt $(if $(SOUND),,unsound)
	@echo 'installing what running needs into .venv; the first time takes a minute beside the download of PyTorch'
	@$(PYTHON) deploy/install.py torch==$(TORCH) $(CLIENT) '.[worker,otel,local]'
	@touch $(RUN)

$(DEV): $(RUN)
	@echo 'installing what the tests need into .venv'
	@$(PYTHON) deploy/install.py torch==$(TORCH) $(CLIENT) '.[worker,otel,local,dev]'
	@touch $(DEV)

run: install
	@exec $(BIN)/python -m deploy.local

demo: install
	@printf '[Verse]\nHello world\n[Chorus]\nLa la la' | $(BIN)/heartmula \
		--url http://127.0.0.1:$${HEARTMULA_PORT:-8000} generate --lyrics-file - --tags pop,piano,english --seconds 20 \
		--output demo.flac

# The page is tested in chromium; where it is missing and cannot be installed, those tests are skipped.
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; \
	} >/dev/null || true

# Beside one another: what reads the code takes little of the time in which tests wait. Both must pass.
test: browser $(DEV)
	@$(MAKE) --no-print-directory --jobs 2 lint run-tests

# Four at once, because tests mostly wait. Without passive waiting torch's idle threads
# take half of the processors' time.
# Tests start hundreds of processes: without bytecode on the disk each would compile its packages anew.
run-tests: $(DEV)
	OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 4 --dist loadfile $(PYTEST_ARGS)

# Each line that was run is listed, and each that was not, with the reason.
test-real: $(DEV)
	@$(BIN)/python -m pytest tests/real -m real -rps $(PYTEST_ARGS)

# heartlib pins older versions, which this project does not follow, and imports what it does not use here.
$(REFERENCE_VENV)/.installed: pyproject.toml
	@echo 'installing heartlib and what it needs into $(REFERENCE_VENV)'
	@$(PYTHON) -m venv $(REFERENCE_VENV)
	@$(REFERENCE_VENV)/bin/python -m pip install --quiet torch==$(TORCH)
	@$(REFERENCE_VENV)/bin/python -m pip install --quiet vector-quantize-pytorch==1.27.15 'transformers==4.57.*' \
		omegaconf sentencepiece tiktoken pytest pytest-asyncio pytest-timeout --editable .
	@$(REFERENCE_VENV)/bin/python -m pip install --quiet --no-deps torchtune==0.4.0 torchao==0.9.0 '$(HEARTLIB)'
	@echo '$(CURDIR)/tests/golden/stubs' >"$$($(REFERENCE_VENV)/bin/python -c 'import site; print(*site.getsitepackages())')/stubs.pth"
	@touch $@

test-reference: $(REFERENCE_VENV)/.installed
	@$(REFERENCE_VENV)/bin/python -m pytest --confcutdir tests/golden tests/golden/test_heartlib.py tests/golden/test_heartlib_codec.py \
		tests/golden/test_transformers.py $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(DEV)
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

cluster: $(DEV)
	@$(BIN)/python -m tests.cluster $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

bench: install
	@$(BIN)/python -m tests.bench $(BENCH) $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(BENCH_INT8),--int8 $(BENCH_INT8))

# With PYTHON=… on the command line that Python is used as it is, and nothing is installed.
gpu: $(if $(filter command,$(origin PYTHON)),,$(DEV))
	@$(if $(filter command,$(origin PYTHON)),$(PYTHON),$(BIN)/python) tests/gpu/__main__.py $(if $(PART),--part $(PART)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(WHEELS),--wheels $(WHEELS))

bench-flow: $(DEV)
	@$(BIN)/python -m tests.bench.flow

bench-gateway: $(DEV)
	@$(BIN)/python -m tests.bench.gateway

bench-pairs: install
	@$(BIN)/python -m tests.bench.pairs $(BASE) $(CASES)

bench-stream: $(DEV)
	@$(BIN)/python -m tests.bench.stream $(CASES) $(if $(BASE),--base $(BASE)) $(if $(CPU_TIME),--cpu-time)

screenshots: $(DEV)
	@$(BIN)/python -m tests.browser.screenshots

check-images:
	@deploy/docker/check.sh

models: install
	$(BIN)/hf download HeartMuLa/HeartMuLaGen gen_config.json tokenizer.json --local-dir $(MODELS)
	$(BIN)/hf download HeartMuLa/HeartMuLa-oss-3B-happy-new-year --local-dir $(MODELS)/HeartMuLa-oss-3B
	$(BIN)/hf download HeartMuLa/HeartCodec-oss-20260123 --local-dir $(MODELS)/HeartCodec-oss
	$(if $(ENCODER),$(BIN)/hf download HeartMuLa/HeartCodec-oss-encoder --local-dir $(MODELS)/HeartCodec-oss-encoder)
	@echo 'now: HEARTMULA_MODEL_PATH=$(MODELS) make run'

train-demo: install
	@$(BIN)/python -m ckpt.training train

evaluate-demo: install
	@$(BIN)/python -m ckpt.training evaluate

example: $(DEV)
	@$(BIN)/python -m ckpt.training example

clean:
	rm -rf build dist *.egg-info services/client/build services/client/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find shared services deploy ckpt tests -name __pycache__ -type d -prune -exec rm -rf {} +
