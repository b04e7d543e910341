"""Arguments and options that several commands share, and how a command prints JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TEMPLATES = ("quickstart", "classify", "tag", "extract", "similarity", "seq2seq", "sft", "pretrain", "mlm")

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A job file, a run's name or its folder.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override a value.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: RAY_ADDRESS, else one of our own.")]
Dashboard = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Ray dashboard, e.g. http://head:8265.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Storage = Annotated[str, typer.Option(help="Storage folder or bucket.")]


def print_json(value: Any) -> None:
    """The only thing that a command with --json writes to stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
