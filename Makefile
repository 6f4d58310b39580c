.PHONY: quality style test

quality:
	ruff check cm_diffusers examples tests
	ruff format --check cm_diffusers examples tests
	mypy

style:
	ruff check --fix cm_diffusers examples tests
	ruff format cm_diffusers examples tests

test:
	python -m pytest
