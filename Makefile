# env: the environment    serve, serve-triton: demo server in the foreground    test: all that CI tests
# loadtest: half a minute of load on a running server, as a page    soak: half an hour, for memory and masks
# monitor: Prometheus beside a running server    dashboards: Grafana's JSON and the operator's rules from code
# images: of both servers and the load test    image: of SERVER alone    VARIANT=cuda: for GPUs
# test-all: slow proofs too    check: lint and types    bench: speed, as JSON    clean: start over
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8080
TRITON_PORT ?= 8000
TRITON_GRPC_PORT ?= 8001
SCHEDULE ?= 2,5
METRICS_PORT ?= 8090
SERVER ?= torchserve
VARIANT ?= cpu
TAG ?= latest
RATE ?= 2
SECONDS ?= 30
SLO ?= p99=2s,errors=0.1%

BIN := .venv/bin
ENV := .venv/.installed
TRITON := .venv/.triton
DEMO := model_store/demo
CHECKPOINT ?= $(DEMO)/checkpoint.pth
SAMPLES := build/samples

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# The first that works: a client without its daemon does not.
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info >/dev/null 2>&1 && echo $(tool))))

.PHONY: env serve serve-triton monitor library-masks loadtest soak dashboards images image test test-all check bench clean

env: $(TRITON)

$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
		"Python 3.11 or 3.12 is needed, %s is %d.%d: make PYTHON=python3.12 ..." % ("$(PYTHON)", *v))'
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[server,loadtest,dev]'
	touch $@

# Apart, because its wheels need Linux with glibc 2.35: TorchServe starts without.
$(TRITON): $(ENV)
	$(INSTALL) -e '.[triton]'
	touch $@

SERVED := --schedule $(SCHEDULE) --metrics-port $(METRICS_PORT)

serve: $(ENV)
	exec $(BIN)/mpm serve --host $(HOST) --port $(PORT) $(SERVED)

serve-triton: $(TRITON)
	exec $(BIN)/mpm serve --server triton --host $(HOST) --port $(TRITON_PORT) --grpc-port $(TRITON_GRPC_PORT) $(SERVED)

monitor: $(ENV)
	exec $(BIN)/mpm monitor --target 127.0.0.1:$(METRICS_PORT) --out build/monitor

# Masks have to be those that the library makes of the checkpoint that serves.
MASKS := build/loadtest/masks
LOADTEST := -f loadtest/locustfile.py --headless --only-summary --loglevel WARNING --host http://$(HOST):$(PORT) \
	--metrics http://$(HOST):$(METRICS_PORT)/metrics $(if $(CHECKPOINT),--library-masks $(MASKS)) --rate $(RATE) \
	--accept png=88%,json=12% --raw 10% --bad 5%

library-masks: $(ENV)
	rm -rf $(MASKS)
	$(if $(CHECKPOINT),$(BIN)/mpm loadtest masks --checkpoint $(CHECKPOINT) --metrics http://$(HOST):$(METRICS_PORT)/metrics --out $(MASKS))

loadtest: library-masks
	$(BIN)/locust $(LOADTEST) --run-time $(SECONDS) --slo $(SLO) --report build/loadtest/report.html

soak: library-masks
	$(BIN)/locust $(LOADTEST) --shape soak --server-pid auto --slo errors=0 --report build/loadtest/soak.html

dashboards: $(ENV)
	$(BIN)/python -m k8s.generate

$(SAMPLES): $(ENV)
	$(BIN)/mpm samples --out $@

images:
	$(MAKE) image SERVER=torchserve
	$(MAKE) image SERVER=triton
	$(MAKE) image SERVER=loadtest VARIANT=cpu

# PIP_EXTRA_INDEX_URL: PyTorch's package index for CPUs, the only one with torch's build for a CPU; none for CUDA's
# BUILD_OPTIONS: what else the builder is told, such as --build-arg BASE_IMAGE=...
image:
	$(if $(BUILDER),,$(error neither docker nor podman nor buildah works here))
	$(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker) --file docker/Dockerfile --target $(SERVER) \
		--build-arg VARIANT=$(VARIANT) --build-arg REVISION=$(shell git rev-parse HEAD) \
		$(if $(PIP_EXTRA_INDEX_URL),--build-arg PIP_EXTRA_INDEX_URL=$(PIP_EXTRA_INDEX_URL)) $(BUILD_OPTIONS) \
		--tag mpm-segmenter-$(SERVER):$(TAG)$(if $(filter cuda,$(VARIANT)),-cuda) .

test: $(TRITON)
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadgroup

test-all: $(TRITON)
	$(BIN)/python -m pytest

check: $(TRITON)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(ENV) $(SAMPLES)
	$(BIN)/mpm bench model --checkpoint $(DEMO)/checkpoint.pth --images $(SAMPLES) --out build/bench.json

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache *.egg-info
