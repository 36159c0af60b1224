.PHONY: setup test lint types docs bench ci

setup: ; pip install -c constraints.txt -e ".[test]"
test:  ; pytest
lint:  ; ruff format --check . && ruff check .
types: ; mypy
docs:  ; python eval/make_methods_page.py > docs/METHODS.md
bench: ; python eval/cost/measure.py wanda
ci:    ; .ci/run
