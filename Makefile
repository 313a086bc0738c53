# Two commands do everything: `make demo` and `make test`. Both do all the set-up themselves.

PYTHON ?= python3
BIN := .venv/bin
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock"

.PHONY: help demo test check drill bench contract secrets audit fuzz lock clean

help:
	@echo "To try it"
	@echo "  make demo            broker, database, bridge and a simulated fleet, live in this terminal"
	@echo "  make demo FOR=30s    the same for 30 seconds, then a reconciliation"
	@echo "In production"
	@echo "  make secrets         .env and secrets/ for docker compose: passwords, certificates; keeps what exists"
	@echo "  make secrets HOSTS=broker.example    the broker's certificate is for this name as well"
	@echo "For developers"
	@echo "  make test            lint, types, layers and every test against real services"
	@echo "  make check           lint, types and layers alone"
	@echo "  make contract        write docs/asyncapi.yaml and docs/schemas/ from the code"
	@echo "  make drill           every fault many times at random moments, about two hours; writes docs/reliability.md"
	@echo "  make drill TIMES=3 CASES='1 4b'    some cases, so often; the lines of the others stay"
	@echo "  make bench           how fast it is, part by part, about two hours; writes docs/performance.md"
	@echo "  make bench PARTS='store drain'     some parts (bench/*.py); the tables of the others stay"
	@echo "  make audit           known vulnerabilities of what is pinned, and a list of all of it (SBOM) in build/"
	@echo "  make fuzz FOR=60     hostile topics and payloads for so many seconds each (Linux x86_64)"
	@echo "  make lock            pin the dependencies anew in requirements/"
	@echo "  make clean           remove .venv and everything that tools have left"
	@echo "PYTHON=python3.13 with any of them: the interpreter (3.11 or newer)"

demo:
	@$(PYTHON) bootstrap.py demo
	@$(BIN)/wattbridge demo $(if $(FOR),--for $(FOR))

# The tests mostly wait for processes, so that two at a time take little more than half as long; each worker has services of its own.
test: check
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check:
	@$(PYTHON) bootstrap.py dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

drill:
	@$(PYTHON) bootstrap.py dev
	$(BIN)/python -m tests.chaos.drill --write docs/reliability.md $(if $(TIMES),--times $(TIMES)) $(CASES)

PARTS ?= end_to_end drain store decode latency memory scale workers

bench:
	@$(PYTHON) bootstrap.py dev
	@for part in $(PARTS); do $(BIN)/python bench/$$part.py --write docs/performance.md || exit 1; done

secrets:
	@$(PYTHON) config/make_secrets.py $(addprefix --host ,$(HOSTS))

contract:
	@$(PYTHON) bootstrap.py dev
	$(BIN)/python docs/asyncapi.py

# Both have an environment of their own: what they bring along is nobody else's.
audit:
	@test -x .venv-audit/bin/cyclonedx-py || { $(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom; }
	@rm -rf build/audit && mkdir -p build && $(PYTHON) -m venv --without-pip build/audit
	@.venv-audit/bin/pip --python build/audit/bin/python install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: -r requirements/run.txt
	@.venv-audit/bin/pip --python build/audit/bin/python install --quiet --disable-pip-version-check --no-deps .
	.venv-audit/bin/cyclonedx-py environment --output-reproducible --output-format JSON \
		--output-file build/wattbridge.cdx.json build/audit/bin/python
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements/run.txt

FUZZ := -max_len=8192 -timeout=10 -rss_limit_mb=2048

fuzz:
	@test -e .venv-fuzz/complete || { $(PYTHON) -m venv .venv-fuzz && \
		.venv-fuzz/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.txt && \
		.venv-fuzz/bin/pip install --quiet --disable-pip-version-check 'atheris>=3' && touch .venv-fuzz/complete; }
	@for target in topic payload; do mkdir -p build/fuzz/$$target; \
		.venv-fuzz/bin/python -m tests.fuzz.fuzz $$target -max_total_time=$(or $(FOR),60) $(FUZZ) \
			-artifact_prefix=build/fuzz/found-$$target- build/fuzz/$$target tests/fuzz/corpus/$$target || exit 1; done

lock:
	@$(PYTHON) bootstrap.py dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) --upgrade --extra demo --extra verify --extra web --output-file requirements/demo.txt pyproject.toml requirements/build.in
	$(LOCK) --upgrade --extra demo --extra verify --extra web --group dev --constraint requirements/demo.txt \
		--output-file requirements/dev.txt pyproject.toml requirements/build.in
	$(LOCK) --extra web --constraint requirements/demo.txt --output-file requirements/run.txt pyproject.toml
	$(LOCK) --constraint requirements/demo.txt --output-file requirements/build.txt requirements/build.in

clean:
	rm -rf .venv .venv-audit .venv-fuzz build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
