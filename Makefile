# Every target may be run at any time and does only what is still to be done.

# Debian's Python if it is new enough. Most users run webhookd with it, and it is faster than a Python that was
# built without optimizations, as by pyenv.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo /usr/bin/python3 || echo python3)
PORT ?= 3001
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# .venv holds webhookd, installed from the built wheel, and only what it needs: `make run` runs it, and the
# integration tests test it. .venv-cov holds the same, and measures each line that it runs.
# .venv-dev holds the tools, which work on the checkout.
installed := .venv/.installed
measured := .venv-cov/.installed
tools := .venv-dev/.installed
node_modules := $(patsubst %,%/node_modules/.package-lock.json,tests/node tests/browser docker/bull-board docs/worker/node)
peers := tests/bench/peers/node_modules/.package-lock.json

sources := setup.py pyproject.toml $(shell find webhookd twisted -name '*.py' -o -name '*.lua' -o -name '*.json' -o -name '*.html')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^##@ / { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  %-13s%s\n", $$1, $$2 }' \
	  $(MAKEFILE_LIST)

##@ To use it

.PHONY: run
run: $(installed) ## run the daemon on port 3001, or PORT, with an embedded Redis
	exec .venv/bin/twistd -n --pidfile= webhookd --port $(PORT) --redis embedded:

##@ To test it

pytest_unit := .venv-dev/bin/pytest -p no:twisted tests/unit
pytest_integration := .venv-dev/bin/pytest -n 2 --dist worksteal tests/integration

.PHONY: test
test: debian $(tools) $(node_modules) $(installed) ## run the tests that are not slow, in less than five minutes
	$(pytest_unit)
	$(pytest_integration) -m 'not slow'

.PHONY: test-all
test-all: coverage ## run all tests, under trial too, and measure their coverage
	PYTHONPATH=. .venv-dev/bin/trial tests.unit

# With COVERAGE_PROCESS_START, each Python process writes a file of what it ran, unless SIGKILL ends it.
measure := COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml

.PHONY: coverage
coverage: export COVERAGE_FILE := $(CURDIR)/.coverage-data/data
coverage: debian $(tools) $(node_modules) $(measured) ## run all tests, and fail if they miss too much of webhookd
	rm -rf .coverage-data
	mkdir .coverage-data
	$(measure) $(pytest_unit)
	$(measure) WEBHOOKD_TEST_TWISTD=$(CURDIR)/.venv-cov/bin/twistd $(pytest_integration)
	.venv-dev/bin/coverage combine --quiet
	.venv-dev/bin/coverage report

.PHONY: bench
bench: debian $(tools) $(peers) $(installed) ## measure against Express and Fastify, and write docs/benchmarks.md
	.venv-dev/bin/python -m tests.bench --output docs/benchmarks.md

.PHONY: bench-check
bench-check: debian $(tools) $(peers) $(installed) ## fail if it is slower than promised
	.venv-dev/bin/python -m tests.bench --check

.PHONY: faults
faults: debian $(tools) $(node_modules) $(installed) ## cause each fault under load, and write docs/faults.md
	PYTHONPATH=. .venv-dev/bin/python -m tests.faults

.PHONY: screenshots
screenshots: debian $(tools) $(node_modules) $(installed) ## take the pictures of the status page, in six minutes
	.venv-dev/bin/python -m tests.screenshots

.PHONY: attack
attack: debian $(tools) $(node_modules) $(installed) ## send all attacks, and print the results
	.venv-dev/bin/python -m tests.attack

.PHONY: rollout
rollout: debian $(tools) $(installed) ## restart, kill and scale replicas with nginx, under the promised load
	WEBHOOKD_ROLLOUT=full .venv-dev/bin/pytest tests/integration/test_rollout.py

# Separate from the other tests, because it creates a virtual environment.
.PHONY: newcomer
newcomer: debian $(tools) ## follow README.md in a clean copy, from the installation to the first job
	.venv-dev/bin/pytest tests/newcomer

# Separate from the other tests: it needs root, some hundred MB of tools, and two minutes for its first base image.
.PHONY: image-test
image-test: debian_lists += tests/image/debian-packages.txt
image-test: debian $(tools) ## build the container image, and run it with podman
	.venv-dev/bin/pip install -q --no-deps -r tests/image/requirements.txt
	.venv-dev/bin/pytest tests/image

##@ To change it

.PHONY: lint
lint: $(tools) ## check style, types, layers and words
	.venv-dev/bin/ruff check
	.venv-dev/bin/ruff format --check
	.venv-dev/bin/mypy
	.venv-dev/bin/lint-imports
	.venv-dev/bin/python -m tests.docs.words
	.venv-dev/bin/actionlint
	.venv-dev/bin/zizmor --offline --quiet .github

# The Prometheus operator needs the same rules in its own resources. A test checks that they are the same.
operator_rules := $(patsubst conf/prometheus/rules/%.yml,conf/kubernetes/monitoring/%.yaml,$(wildcard conf/prometheus/rules/*.yml))

.PHONY: rules
rules: $(operator_rules) ## copy the rules of conf/prometheus to conf/kubernetes

$(operator_rules): conf/kubernetes/monitoring/%.yaml: conf/prometheus/rules/%.yml
	{ echo '# Made from $< by "make rules": do not edit.'; \
	  printf '%s\n' 'apiVersion: monitoring.coreos.com/v1' 'kind: PrometheusRule' 'metadata:' '  name: webhookd-$*' 'spec:'; \
	  sed 's/^./  &/' $<; } >$@

.PHONY: docs
docs: $(tools) ## write docs/configuration.md from the options
	.venv-dev/bin/python -m tests.docs.configuration

.PHONY: apidocs
apidocs: $(tools) ## make API pages from the docstrings, in apidocs/
	.venv-dev/bin/pydoctor

.PHONY: wheel
wheel: $(installed) ## build the wheel, and install it for the integration tests

.PHONY: dist
dist: $(tools) ## build and check what a release publishes: the wheel and the source distribution
	rm -rf build dist
	.venv-dev/bin/python -m build
	.venv-dev/bin/twine check --strict dist/*
	.venv-dev/bin/check-wheel-contents dist/*.whl

.PHONY: clean
clean: ## remove all files that the other targets made
	rm -rf .venv .venv-cov .venv-dev .coverage-data build dist *.egg-info apidocs $(dir $(node_modules) $(peers))
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache _trial_temp*

# $(call apt_install,PACKAGES): install Debian packages, with sudo unless root runs make.
define apt_install
sudo=$$([[ $$(id -u) == 0 ]] || echo sudo); \
$$sudo apt-get update -q; \
$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(1)
endef

debian_lists := tests/debian-packages.txt

.PHONY: debian
debian: ## install the Debian packages that the tests need
	@missing=(); \
	for package in $$(grep -hv '^#' $(debian_lists)); do \
	  [[ $$(dpkg-query --show --showformat='$${db:Status-Status}' $$package 2>&1) == installed ]] || missing+=($$package); \
	done; \
	type -P node npm >/dev/null || missing+=(nodejs npm); \
	if (($${#missing[@]})); then $(call apt_install,"$${missing[@]}"); fi

# In Debian, venv needs a separate package.
define make_venv
$(PYTHON) -c 'import ensurepip' || { $(call apt_install,python3-venv); }
$(PYTHON) -m venv --clear $(@D)
endef

# A new venv when the dependencies change, so that it holds nothing that setup.py does not require.
.venv/.created .venv-cov/.created: %/.created: setup.py requirements.lock
	$(make_venv)
	$*/bin/pip install -q --require-hashes -r requirements.lock
	touch $@

# Without this, setuptools would add files to the wheel that are still in build/, but deleted from the checkout.
$(installed): .venv/.created $(sources)
	rm -rf build dist
	.venv/bin/pip wheel -q --no-deps --wheel-dir dist .
	.venv/bin/pip install -q --force-reinstall --no-deps dist/*.whl
	.venv/bin/pip check
	touch $@

# The tests do not pass coverage's variables to their child processes, so each process sets them itself.
$(measured): .venv-cov/.created $(installed) tests/requirements.txt
	.venv-cov/bin/pip install -q $$(grep ^coverage== tests/requirements.txt)
	.venv-cov/bin/pip install -q --force-reinstall --no-deps dist/*.whl
	echo 'import os; os.environ.update(COVERAGE_FILE="$(CURDIR)/.coverage-data/data", COVERAGE_PROCESS_START="$(CURDIR)/pyproject.toml")' \
	  >$$(echo .venv-cov/lib/python3*/site-packages)/a0_measured.pth
	touch $@

$(tools): requirements.txt tests/requirements.txt
	$(make_venv)
	.venv-dev/bin/pip install -q -r tests/requirements.txt
	touch $@

# The lock files name the prebuilt parts of msgpackr only for Linux, on which these tests run.
$(node_modules) $(peers): %/node_modules/.package-lock.json: %/package-lock.json
	cd $(<D) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@
