.PHONY: setup test lint types docs bench ci

setup: ; pip install -c constraints.txt -e ".[test]"
test:  ; pytest
lint:  ; ruff format --check . && ruff check .
types: ; mypy
docs:  ; python -m eval.methods_page > docs/METHODS.md
bench: ; python eval/cost/measure.py wanda
ci:    ; .ci/run
