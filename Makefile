PYTHON ?= python3
# Makes what is missing, then names the environment's Python; the second time it only names it.
ENVIRONMENT = python=$$($(PYTHON) tests/harness/environment.py) && bin=$$(dirname "$$python")

# A file of tests stays in one process, which has a ComfyUI of its own. The slowest tests are named at the end.
TOGETHER = -n 2 --dist loadfile --no-loadscope-reorder --durations 10
IN_BROWSER = -n 2 --durations 10 tests/browser

VERSIONS = 0.30.0 0.24.0 0.20.1
QUICK = $(addprefix tests/comfy/test_,nodes.py stock.py bad_input.py rewards.py selection.py workflows.py)

.PHONY: demo test ui lint unit quick versions browser bench bench-cost bench-gpu-pack schemas pictures thumbnails clean

demo: ## a real ComfyUI, unguided and guided, in demo.png
	@$(ENVIRONMENT) && "$$python" tests/tools demo

test: lint ## everything
	@$(ENVIRONMENT) && "$$bin/pytest" $(TOGETHER) tests/unit tests/comfy && "$$bin/pytest" $(IN_BROWSER)

unit: ## the tests that need no ComfyUI
	@$(ENVIRONMENT) && "$$bin/pytest" $(TOGETHER) tests/unit

quick: ## the part that is run on every version of ComfyUI
	@$(ENVIRONMENT) && "$$bin/pytest" $(TOGETHER) $(QUICK)

versions: ## the quick part on older releases of ComfyUI too, each with its own requirements (6 GB each)
	@for version in $(VERSIONS); do echo "== ComfyUI $$version" && COMFYUI_VERSION=$$version $(MAKE) --no-print-directory quick || exit 1; done

browser: ## the tests in a real browser; their screenshots are in output/browser
	@$(ENVIRONMENT) && "$$bin/pytest" $(IN_BROWSER)

lint: ## ruff and mypy
	@$(ENVIRONMENT) && "$$python" tests/tools lint

ui: ## the same ComfyUI for a person
	@$(ENVIRONMENT) && "$$python" tests/tools ui

bench: ## the numbers in the README
	@$(ENVIRONMENT) && for file in tests/bench/*.py; do echo "== $$file" && "$$python" "$$file" || exit 1; done

bench-cost: ## what guidance costs, on reduced models or on a GPU; minutes
	@$(ENVIRONMENT) && "$$python" tests/bench/cost

bench-gpu-pack: ## what a bare machine with a GPU lacks for that, in .gpu, and the proof that it is all
	@$(ENVIRONMENT) && "$$python" tests/bench/cost/pack.py --prove

schemas: ## tests/comfy/node_schemas.json and locales/en/nodeDefs.json, from what the nodes say now
	@$(ENVIRONMENT) && RENEW_SCHEMAS=1 "$$bin/pytest" tests/comfy/test_schema.py tests/comfy/test_words.py

pictures: ## the pictures of the help pages
	@$(ENVIRONMENT) && "$$python" tests/tools pictures && "$$python" tests/tools node_pictures

thumbnails: ## the pictures of the example workflows
	@$(ENVIRONMENT) && "$$python" tests/tools thumbnails

clean: ## the environment, ComfyUI and stand-ins in the cache folder, and what the demo wrote
	@$(PYTHON) tests/harness/environment.py --remove
	@rm -rf demo.png demo.json output/browser .pytest_cache .ruff_cache .mypy_cache .hypothesis tests/.pytest_cache tests/.hypothesis
