"""The command `tuneyard export`. It imports what it needs when it runs, so that --help answers at once."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import AsJson, Storage, complete_run, flag, print_json
from trainers.errors import EvaluationError, JobError

app = typer.Typer()
ALLOWANCE = 0.01


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            autocompletion=complete_run,
            help="A run; with --quantize also an exported folder, NAME[@VERSION].",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; default: the best.")] = None,
    adapter: Annotated[bool, flag("--adapter", help="The adapters of a run with LoRA, for PEFT.")] = False,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="FORM", help="q8_0 (GGUF; families llama, qwen2, qwen3), int8 or fp8 (by torchao)."),
    ] = None,
    allowance: Annotated[
        float, typer.Option(help="Share of the metric that quantizing may lose; beyond it nothing is written.")
    ] = ALLOWANCE,
    storage: Storage = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow tracking server.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a model folder; its adapters; or a quantized model, judged on the run's evaluation rows."""
    from orchestrator.commands.find_run import find_job
    from orchestrator.exporting.export import export_step, quantize_model

    if quantize is None:
        written = export_step(*find_job(run, storage), step, out, adapter)
        told = f"wrote {'the adapters of ' if adapter else ''}step {written} to {out}"
        print_json({"step": written, "out": str(out)}) if as_json else print(told)
        return
    if adapter:
        raise JobError("--adapter and --quantize: adapters are small as they are; choose one")
    verdict = quantize_model(run, quantize, out, storage, step, uri, allowance)
    if as_json:
        print_json(verdict.model_dump(mode="json"))
    elif verdict.kept:
        sizes = f"{verdict.bytes:,} bytes of weights, unquantized {verdict.unquantized_bytes:,}"
        print("\n".join([f"{quantize} {verdict.reason}", *verdict.notes, f"wrote {out}: {sizes}"]))
    if not verdict.kept:
        raise EvaluationError(f"{quantize} {verdict.reason}; the numbers are in {out}.refused.json")
