# Every verb does its own set-up: Debian packages, a virtual environment in .venv, the build.
# Needs root for the packages, the TAP and the namespaces. ARGS='...' is passed on to the command.

VENV   := .venv
PYTHON := $(VENV)/bin/python
PATH   := $(CURDIR)/$(VENV)/bin:$(PATH)
export PATH

# What a build and the demo need, and what the tests add: real peers (Open vSwitch, BIRD), a second
# opinion on the wire (tshark), and tools that look from outside.
APT_RUN  := gcc libc6-dev linux-libc-dev nftables python3-dev python3-venv
APT_TEST := bird2 containernetworking-plugins etcd-client etcd-server ethtool git iproute2 iputils-ping openssl \
            openvswitch-switch patchelf strace tcpdump tshark

# Real callers of the plugin, and the control planes it runs under.
APT_E2E  := busybox-static conntrack containerd containernetworking-plugins etcd-client etcd-server iptables \
            openssl podman runc socat

# A load generator, and the systems that are compared.
APT_COMPARE := iperf3 iproute2 openvswitch-switch wireguard-go wireguard-tools

SOURCES := setup.py pyproject.toml $(wildcard fastpath/*.p[yx]* fastpath/*/*.p[yx]* fastpath/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-slow e2e lint bench bench-against compare lock clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

build: $(VENV)/built  ## compile the fast path and install podloom into .venv

demo: build  ## nodes, pods and traffic on this machine, checked and removed again
	@podloom demo $(ARGS)

test: $(VENV)/apt-test build  ## lint, then every test but the slow ones
	@$(MAKE) --no-print-directory lint
	@$(PYTHON) -m pytest -m 'not slow' $(ARGS)

test-slow: $(VENV)/apt-test build  ## the tests that take minutes
	@$(PYTHON) -m pytest -m slow --timeout 1800 $(ARGS)

e2e: $(VENV)/apt-test $(VENV)/apt-e2e build  ## containerd, podman, and kubelet where PODLOOM_KUBELAB names a lab
	@$(PYTHON) -m pytest tests/kube -m 'slow or not slow' --timeout 900 $(ARGS)

lint: build  ## ruff, mypy --strict, cython-lint, import rule
	@ruff check --quiet .
	@ruff format --check --quiet .
	@mypy
	@cython-lint fastpath bench
	@$(PYTHON) -m pytest tests/architecture

bench: build  ## pytest-benchmark over every stage, into bench-results/
	@mkdir -p bench-results
	@$(PYTHON) -m pytest -o python_files='bench_*.py' bench --benchmark-only \
	  --benchmark-json=bench-results/bench.json --benchmark-columns=median,iqr,rounds \
	  --benchmark-sort=name --benchmark-max-time=0.5 $(ARGS)

bench-against: build  ## this checkout and another revision in turns: REV=<commit>
	@$(PYTHON) -m bench.against $(REV) $(ARGS)

compare: $(VENV)/apt-compare build  ## podloom beside the kernel's VXLAN and others, end to end
	@$(PYTHON) -m bench.compare $(ARGS)

lock: $(VENV)/python  ## write requirements.lock anew from pyproject.toml's lower bounds
	@rm -rf $(VENV)/lock && python3 -m venv $(VENV)/lock
	@$(VENV)/lock/bin/pip install --quiet '.[dev]'
	@$(VENV)/lock/bin/pip freeze --all --exclude pip --exclude podloom > requirements.lock
	@rm -rf $(VENV)/lock

clean:  ## remove what the build made
	@rm -rf $(VENV) build *.egg-info bench-results
	@find fastpath tests -name '*.so' -delete
	@find fastpath -name '*.c' -delete

# apt-install NAMES: those that are missing, and a sentence where they cannot be installed.
define apt-install
	@missing=$$(for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing Debian packages:" $$missing; \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || \
	    { echo "install them by hand: this needs root and apt-get" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi
endef

$(VENV)/apt-run: Makefile
	$(call apt-install,$(APT_RUN))
	@mkdir -p $(VENV) && touch $@

$(VENV)/apt-test: Makefile
	$(call apt-install,$(APT_TEST))
	@mkdir -p $(VENV) && touch $@

$(VENV)/apt-compare: Makefile
	$(call apt-install,$(APT_COMPARE))
	@mkdir -p $(VENV) && touch $@

$(VENV)/apt-e2e: Makefile
	$(call apt-install,$(APT_E2E))
	@mkdir -p $(VENV) && touch $@

$(VENV)/python: $(VENV)/apt-run requirements.lock
	@python3 -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/built: $(VENV)/python $(SOURCES)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
