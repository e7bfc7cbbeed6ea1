.PHONY: setup demo test lint

setup:
	@./setup.sh

demo: setup
	.venv/bin/causalrm-ray train-policy --config jobs/configs/demo.yaml

test: setup lint
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check
