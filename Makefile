# Two commands do all the set-up: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS = 1
export RAY_USAGE_STATS_ENABLED = 0
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes import the package: compiled once, each starts 0.25 s sooner

ENGINES := .venv-pipelines
UV := $(ENGINES)/uv/bin/uv

.PHONY: every demo test docs package slow engines differential clouds pipelines chaos simulate mutate lowest check audit format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ties_ray needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m ties_ray.kernels
	touch $@

demo: $(VENV)/installed  ## make a small family, merge it on a local Ray cluster, say where the result lies
	$(BIN)/python -m benchmarks.demo .demo

EVERY := tests/promises/test_every_method_on_ray.py
SLOW := tests/driver/test_clusters.py tests/promises/test_gpu.py tests/promises/test_architectures.py tests/promises/test_devices.py tests/driver/test_nodes.py tests/test_docs_run.py tests/test_examples.py tests/hostile/test_documents.py tests/hostile/test_bounded.py tests/stores/test_s3_dialects.py tests/promises/test_remedies.py tests/promises/test_peft.py tests/promises/test_pools_on_s3.py tests/promises/test_many_results.py tests/test_benchmarks.py tests/kernels/test_cuda.py tests/kernels/test_compiler.py tests/executors/test_ray.py tests/promises/test_adapters.py tests/promises/test_mergekit.py tests/driver/test_simulation.py tests/operations/test_searching.py tests/operations/test_evaluating.py tests/cli/test_scores.py

test: $(VENV)/installed  ## all tests but the slow ones, file by file: three at a time fill two cores, as some wait
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --durations=12 $(addprefix --ignore=,tests/pipelines tests/packaging $(EVERY) $(SLOW))

$(UV):
	$(PYTHON) -m venv $(ENGINES)/uv
	$(ENGINES)/uv/bin/python -m pip install --quiet uv==0.13.9

$(ENGINES)/%/installed: pipelines/%/constraints.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(@D)
	$(UV) pip install --quiet --python $(@D) --requirement $<
	touch $@

engines: $(foreach engine,airflow dagster kfp,$(ENGINES)/$(engine)/installed)

docs: $(VENV)/installed  ## the site, in build/site; broken links and other warnings are errors
	$(BIN)/python -m docs.generate build/docs
	$(BIN)/zensical build --strict --clean
	! grep -rlE "<(script|link|img|iframe)[^>]*(src|href)=.?(https?:)?//" build/site --include="*.html"  # no page asks another host for anything

package: $(VENV)/installed  ## wheels and sdists: what they hold, and that they work in environments of their own
	$(BIN)/python -m pytest -q tests/packaging

slow: $(VENV)/installed  ## the code of all pages and notebooks; searches and scores; all architectures; nodes that die; pools of adapters; 200 adapters from a bucket, on Ray; sweeps, windows and pools on Ray, killed; every benchmark, small; the GPU's kernels, interpreted; the executor on Ray
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=5 $(SLOW)

every: $(VENV)/installed  ## each method on Ray, over checkpoints and adapters; on demand
	$(BIN)/python -m pytest -q $(EVERY)

MERGEKIT := .venv-mergekit
FUSION := .venv-fusion

$(MERGEKIT)/installed:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet torch mergekit==0.1.5
	touch $@

$(FUSION)/installed:
	$(PYTHON) -m venv $(FUSION)
	$(FUSION)/bin/python -m pip install --quiet torch==2.13.0 fusion-bench==0.2.33
	touch $@

differential: $(VENV)/installed $(MERGEKIT)/installed $(FUSION)/installed  ## mergekit and fusion_bench, each in an environment of its own, beside the oracles, and mergekit beside our merges
	$(MERGEKIT)/bin/python -m tests.tools.oracles.differential
	$(FUSION)/bin/python -m tests.tools.oracles.differential
	TIES_RAY_MERGEKIT=$(MERGEKIT)/bin/python $(BIN)/python -m pytest -q tests/promises/test_mergekit.py

CLOUDS := .venv-clouds

$(CLOUDS)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(CLOUDS)
	$(CLOUDS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(CLOUDS)/bin/python -m pip install --quiet adlfs==2026.8.0 gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19
	npm install --silent --no-audit --no-fund --prefix $(CLOUDS)/azurite azurite@3.35.0
	touch $@

clouds: $(CLOUDS)/installed  ## gs:// and az:// beside emulators, in an environment of their own; needs npm
	TIES_RAY_AZURITE=$(CLOUDS)/azurite/node_modules/.bin/azurite-blob $(CLOUDS)/bin/python -m pytest -q tests/stores/test_clouds.py

pipelines: $(VENV)/installed engines  ## each engine, in an environment of its own, with its package installed in it
	for engine in airflow dagster kfp; do \
		$(UV) pip install --quiet --constraint pipelines/$$engine/constraints.txt --python $(ENGINES)/$$engine \
			--reinstall-package ties-ray-pipelines --reinstall-package ties-ray-$$engine \
			./pipelines/core ./pipelines/$$engine || exit 1; done
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5 tests/pipelines

chaos: $(VENV)/installed  ## 300 merges under faults and kills (an hour), and the proof that it would notice
	$(BIN)/python -m tests.tools.chaos --prove
	$(BIN)/python -m tests.tools.chaos --merges 300 --ray 40 --least-faults 20 --least-kills 10 --least-troubles 5

MUTATION := .venv-mutation

$(MUTATION)/installed:
	$(PYTHON) -m venv $(MUTATION)
	$(MUTATION)/bin/python -m pip install --quiet cosmic-ray==8.7.0
	touch $@

mutate: $(VENV)/installed $(MUTATION)/installed  ## modules are changed one place at a time: do their tests notice? On demand, hours; MODULES="lease promote" for some
	$(BIN)/python -m tests.tools.mutate $(MODULES)

LOWEST := .venv-lowest

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST) --constraint constraints-lowest.txt --editable '.[dev,hf,parquet,pandas,optuna,report,evaluate]'
	touch $@

# PEFT writes some variants of these tests from 0.21 on, and 0.18 warns of a missing config; transformers 5.0 and 5.1 accept
# a folder without a tokenizer; clients of huggingface_hub 1 leave their sockets to the collector; Ray 2.52 loses what a worker
# has counted in its last seconds
OLDER := --deselect tests/formats/test_lora.py::test_what_peft_wrote_is_read_as_the_change_that_peft_merges \
	--deselect tests/operations/test_subjects.py::test_an_adapter_is_scored_on_its_base \
	--deselect tests/executors/test_metrics.py::test_prometheus_finds_the_counts_of_a_merge_at_rays_nodes \
	--deselect tests/evaluations/test_models.py::test_a_missing_tokenizer_and_an_unknown_device_are_refused \
	-W ignore::pytest.PytestUnraisableExceptionWarning

lowest: $(LOWEST)/installed  ## the tests with the lowest versions that pyproject.toml allows; on demand
	$(LOWEST)/bin/python -m pytest -q -n 3 --dist loadfile $(OLDER) $(addprefix --ignore=,tests/pipelines tests/packaging $(EVERY) $(SLOW))

simulate: $(VENV)/installed  ## 1000 merges in virtual time under drawn faults (two minutes), and the proof that it would notice (one more)
	$(BIN)/python -m tests.tools.simulation --prove
	$(BIN)/python -m tests.tools.simulation --seeds 1000

check: $(VENV)/installed  ## what is looked at besides tests: style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.tools.limits

audit: | $(UV)  ## known weaknesses of the pinned versions; asks the network, so it is no part of .ci/run
	$(UV) tool run pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(ENGINES) $(MERGEKIT) $(FUSION) $(MUTATION) $(LOWEST) .demo build dist *.egg-info
