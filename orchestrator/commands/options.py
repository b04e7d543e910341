"""Arguments and options that several commands share, and how a command prints JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TEMPLATES = ("quickstart", "classify", "tag", "extract", "similarity", "seq2seq", "sft", "pretrain", "mlm")


def flag(*names: str, help: str, **settings: Any) -> Any:
    """An option that takes no value; help shows none."""
    return typer.Option(*names, metavar="", help=help, **settings)


def complete_template(incomplete: str) -> list[str]:
    """Names of templates, for a shell."""
    return [name for name in TEMPLATES if name.startswith(incomplete)]


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names of runs and job files, for a shell; without any it offers files."""
    storage = Path(str(context.params.get("storage") or "runs"))
    names = [path.parent.name for path in (storage / "runs").glob("*/job.yaml")] + [
        path.name for path in Path().glob("*.yaml")
    ]
    return sorted(name for name in names if name.startswith(incomplete))


def complete_field(incomplete: str) -> list[str]:
    """Fields of the job file with a `=`, for a shell."""
    from pydantic import BaseModel

    from trainers.job.schema import Job

    names: list[str] = []
    for section, field in Job.model_fields.items():
        kind = field.annotation
        inner = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        names += [section] if inner is None else [f"{section}.{name}" for name in inner]
    return [f"{name}=" for name in names if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    """GPUs that `plan` knows, for a shell."""
    from orchestrator.planning.hardware import GPUS

    return [name for name in GPUS if name.startswith(incomplete)]


Template = Annotated[
    str,
    typer.Argument(metavar="TEMPLATE", autocompletion=complete_template, help="One of " + ", ".join(TEMPLATES) + "."),
]
Gpu = Annotated[
    str | None,
    typer.Option(autocompletion=complete_gpu, help="Plan for this GPU, such as h100-80; default: this machine's."),
]
JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", autocompletion=complete_run, help="A job file, a run's name or its folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", autocompletion=complete_field, help="Override a value."),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: RAY_ADDRESS, else one of our own.")]
Dashboard = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Ray dashboard, e.g. http://head:8265.")
]
AsJson = Annotated[bool, flag("--json", help="Print JSON.")]
Storage = Annotated[str, typer.Option(help="Storage folder or bucket.")]


def print_json(value: Any) -> None:
    """The only thing that a command with --json writes to stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
