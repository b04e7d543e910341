"""`tuneyard registry`: look at registered models, and promote, roll back, verify or collect them by hand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.options import AsJson, Storage, flag, print_json
from trainers.errors import EvaluationError

if TYPE_CHECKING:
    from orchestrator.registry.read import ModelVersion, RegisteredModel
    from orchestrator.registry.remeasure import Remeasured

app = typer.Typer(help="The model registry.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Name of the registered model.")]
Version = Annotated[str | None, typer.Argument(help="Number of a version; default: the champion.")]
Uri = Annotated[str | None, typer.Option(help="MLflow tracking server; default: SQLite under the storage folder.")]


@app.command("list")
def list_command(storage: Storage = "runs", uri: Uri = None, as_json: AsJson = False) -> None:
    """List registered models."""
    from orchestrator.registry.read import list_models

    models = list_models(_uri(storage, uri))
    print_json([model.model_dump(mode="json") for model in models]) if as_json else _show_models(models)


@app.command()
def show(
    model: Model,
    version: Annotated[str | None, typer.Argument(help="Number of a version, or champion: everything on it.")] = None,
    storage: Storage = "runs",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's versions, one a line; with a version its metrics, files and lineage."""
    from orchestrator.registry.manage import pick_version
    from orchestrator.registry.read import show_model

    where = _uri(storage, uri)
    versions = [pick_version(where, model, version)] if version else show_model(where, model)
    if as_json:
        print_json([one.model_dump(mode="json") for one in versions])
    elif version:
        _show_version(versions[0])
    else:
        _show_versions(model, versions)


@app.command()
def path(model: Model, version: Version = None, storage: Storage = "runs", uri: Uri = None) -> None:
    """Print the model folder of a version, and nothing else."""
    from orchestrator.registry.manage import pick_version

    print(pick_version(_uri(storage, uri), model, version).source)


@app.command()
def promote(
    model: Model,
    version: Annotated[str, typer.Argument(help="Number of the version.")],
    if_better: Annotated[bool, flag(help="Only where it beats the champion, as after a run.")] = False,
    storage: Storage = "runs",
    uri: Uri = None,
) -> None:
    """Make a version the champion."""
    from orchestrator.registry.manage import pick_version, weigh_versions
    from orchestrator.registry.manage import promote as give_alias

    where = _uri(storage, uri)
    chosen = pick_version(where, model, version)
    if if_better:
        decision = weigh_versions(where, chosen)
        print(decision.reason)
        if not decision.promote:
            raise EvaluationError(f"{model} version {chosen.version} did not become champion, see above")
    give_alias(where, chosen)
    print(f"{model} version {chosen.version} is champion")


@app.command()
def rollback(model: Model, storage: Storage = "runs", uri: Uri = None) -> None:
    """Give the alias champion back to the version that held it before."""
    from orchestrator.registry.manage import rollback as take_back

    print(f"{model} version {take_back(_uri(storage, uri), model)} is champion again")


@app.command()
def verify(
    model: Model,
    version: Version = None,
    metric: Annotated[bool, flag("--metric", help="Evaluate it again too, on the evaluation rows of its run.")] = False,
    storage: Storage = "runs",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Compute the digests of a version's files again, and its metrics with --metric; exit 6 where one differs."""
    from orchestrator.registry.manage import pick_version, verify_files
    from orchestrator.terminal.table import show as show_table

    chosen = pick_version(_uri(storage, uri), model, version)
    checks = verify_files(chosen)
    bad = [check.file for check in checks if check.state != "ok"]
    found = _remeasure(chosen) if metric and checks and not bad else None
    files = [check.model_dump() for check in checks]
    if as_json:
        print_json({"files": files, "metric": found.model_dump() if found else None} if metric else files)
    else:
        title = f"{model} version {chosen.version}: {chosen.source}"
        show_table(title, ("file", "state"), [(check.file, check.state) for check in checks])
        _show_remeasured(found) if found else None
    if found and found.different:
        raise EvaluationError(
            f"{model} version {chosen.version} does not measure as it was registered: {', '.join(found.different)}; "
            "its weights, or the evaluation rows, are others"
        )
    if bad or not checks:
        raise EvaluationError(
            f"{model} version {chosen.version} is not as it was registered: "
            f"{', '.join(bad) or 'no file was recorded'}; `tuneyard export` writes its checkpoint again"
        )


@app.command()
def push(
    model: Model,
    repository: Annotated[str, typer.Argument(help="Repository on the Hub, e.g. acme/topics; made where missing.")],
    version: Version = None,
    public: Annotated[bool, flag("--public", help="For everybody to see; else the repository is private.")] = False,
    storage: Storage = "runs",
    uri: Uri = None,
) -> None:
    """Send a version's model folder with its card to the Hub; its digests are checked first."""
    from orchestrator.registry.manage import pick_version
    from orchestrator.registry.push import push as send

    print(send(pick_version(_uri(storage, uri), model, version), repository, not public))


@app.command()
def compare(
    model: Model,
    first: Annotated[str, typer.Argument(help="Number of a version, or champion.")],
    second: Annotated[str, typer.Argument(help="Number of a version, or champion.")],
    storage: Storage = "runs",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Show how two versions differ: their jobs, then their metrics with the paired bootstrap's interval."""
    from orchestrator.commands.compare import show_comparison
    from orchestrator.registry.comparison import compare_sides, side_of_version
    from orchestrator.registry.manage import pick_version

    where = _uri(storage, uri)
    found = compare_sides([side_of_version(pick_version(where, model, version)) for version in (first, second)])
    print_json(found.model_dump(mode="json")) if as_json else show_comparison(found)


@app.command()
def gc(
    model: Model,
    keep: Annotated[int, typer.Option(min=0, help="Newest versions whose files stay.")] = 3,
    delete: Annotated[bool, flag("--delete", help="Delete; without it they are only listed.")] = False,
    storage: Storage = "runs",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Delete the model folders of old versions; the champion, the one before it and the newest stay."""
    from orchestrator.registry.manage import collect
    from orchestrator.terminal.table import show as show_table

    gone = collect(_uri(storage, uri), model, keep, delete)
    if as_json:
        print_json([one.model_dump() for one in gone])
        return
    title = f"{'deleted' if delete else 'would be deleted with --delete'}: {sum(one.bytes for one in gone):,} bytes"
    show_table(title, ("version", "folder", "bytes"), [(one.version, one.folder, one.bytes) for one in gone])


def _remeasure(version: "ModelVersion") -> "Remeasured":
    from orchestrator.registry.remeasure import remeasure

    return remeasure(version)


def _show_remeasured(found: "Remeasured") -> None:
    from orchestrator.terminal.table import show as show_table

    rows = [(one.metric, repr(one.recorded), repr(one.again) if one.again is not None else None, one.state)
            for one in found.metrics]  # fmt: skip
    bound = f"a tolerance of {found.tolerance:g}" if found.tolerance else "every bit the same"
    title = f"metrics over {found.rows:,} rows, recorded on {found.recorded_on}, now on {found.computed_on}: {bound}"
    show_table(title, ("metric", "recorded", "now", "state"), rows)


def _uri(storage: str, uri: str | None) -> str:
    from orchestrator.registry.mlflow_client import registry_uri

    return registry_uri(storage, uri)


def _show_models(models: "Sequence[RegisteredModel]") -> None:
    from orchestrator.registry.read import RegisteredModel
    from orchestrator.terminal.table import show as show_table

    if not models:
        print("no models yet")
        return
    names = list(RegisteredModel.model_fields)
    rows = [[*(getattr(model, name) for name in names[:-1]), _minute(model.updated)] for model in models]
    show_table("registered models", names, rows)


def _minute(iso: str) -> str:
    """A time in UTC, short enough for a column."""
    return f"{iso[:16].replace('T', ' ')} UTC"


def _show_versions(model: str, versions: "Sequence[ModelVersion]") -> None:
    from orchestrator.terminal.table import show as show_table

    rows = [
        (
            version.version,
            "champion" if version.champion else "",
            version.metric,
            version.metrics.get(version.metric),
            version.step,
            version.run.rpartition("/")[2],
            _minute(version.created),
        )
        for version in versions
    ]
    show_table(f"{model}: versions", ("version", "alias", "metric", "value", "step", "run", "created"), rows)


def _show_version(version: "ModelVersion") -> None:
    from orchestrator.terminal.table import show as show_table

    fields = version.model_dump(mode="json")
    files = {name: f"{file.bytes:,} bytes, {file.digest}" for name, file in version.files.items()}
    nested = {name: value for name, value in fields.items() if isinstance(value, dict)} | {"files": files}
    rows = [(name, value) for name, value in fields.items() if name not in nested]
    rows += [(f"{name}.{key}", value) for name, values in nested.items() for key, value in values.items()]
    show_table(f"{version.model} version {version.version}", ("what", "value"), rows)
