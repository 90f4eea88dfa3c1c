PYTHON ?= python3
# Makes what is missing, then names the environment's Python; the second time it only names it.
ENVIRONMENT = python=$$($(PYTHON) tests/harness/environment.py) && bin=$$(dirname "$$python")

.PHONY: demo test ui lint unit browser bench pictures thumbnails clean

demo: ## a real ComfyUI, unguided and guided, in demo.png
	@$(ENVIRONMENT) && "$$python" tests/harness demo

test: lint ## everything
	@$(ENVIRONMENT) && "$$bin/pytest" tests/unit tests/comfy && "$$bin/pytest" tests/browser

unit: ## the tests that need no ComfyUI
	@$(ENVIRONMENT) && "$$bin/pytest" tests/unit

browser: ## the tests in a real browser; their screenshots are in output/browser
	@$(ENVIRONMENT) && "$$bin/pytest" tests/browser

lint: ## ruff and mypy
	@$(ENVIRONMENT) && "$$python" tests/harness lint

ui: ## the same ComfyUI for a person
	@$(ENVIRONMENT) && "$$python" tests/harness ui

bench: ## the numbers in the README
	@$(ENVIRONMENT) && for file in tests/bench/*.py; do echo "== $$file" && "$$python" "$$file" || exit 1; done

pictures: ## the pictures of the help pages
	@$(ENVIRONMENT) && "$$python" tests/harness pictures

thumbnails: ## the pictures of the example workflows
	@$(ENVIRONMENT) && "$$python" tests/harness thumbnails

clean: ## the environment, ComfyUI and stand-ins in the cache folder, and what the demo wrote
	@$(PYTHON) tests/harness/environment.py --remove
	@rm -rf demo.png demo.json output/browser .pytest_cache .ruff_cache .mypy_cache .hypothesis tests/.pytest_cache tests/.hypothesis
