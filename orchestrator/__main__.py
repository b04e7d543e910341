"""`python -m orchestrator` is the program `tuneyard`."""

from orchestrator.cli import main

main()
