"""Run the command line: `python -m llmprune`."""

from llmprune.cli import main

main()
