"""`tuneyard serve`: which model answers, its digests checked; NAME@champion follows the champion."""

import shlex

from orchestrator.commands.predict import find_model
from orchestrator.registry.digests import digest_file
from orchestrator.registry.manage import pick_version, verify_files
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.read import CHAMPION, ModelVersion
from orchestrator.serving.apps import ServedModel, is_causal
from orchestrator.serving.server import bind, serve
from trainers.checkpoint.export import PROVENANCE, Provenance
from trainers.errors import EvaluationError
from trainers.storage import Folder


def serve_model(name: str, storage: str, step: int | None, uri: str | None, host: str, port: int) -> None:
    """Answer over HTTP until Ctrl-C or SIGTERM.

    Raises:
        PlacementError: where the address is taken.
        EvaluationError: where a file of the model is not as it was written.
    """
    bound = bind(host, port)
    model = served_model(name, storage, step, uri)

    def ready() -> None:
        port = bound.getsockname()[1]  # that of 0 is any
        where = f"http://{host}:{port}"
        paths = "/v1/chat/completions and /v1/completions" if is_causal(model.job) else "/predict"
        print(f"{model.name} answers at {where}{paths}; health at {where}/health", flush=True)
        if is_causal(model.job):
            print(f"faster, on GPUs: {vllm_line(model, host, port)}", flush=True)

    def newer(present: ServedModel) -> ServedModel | None:
        if present.version is None or not name.endswith(f"@{CHAMPION}"):
            return None
        standing = pick_version(registry_uri(storage, uri), name.rpartition("@")[0])
        return served_model(name, storage, step, uri) if standing.version != present.version else None

    serve(model, bound, newer, lambda line: print(line, flush=True), ready)


def served_model(name: str, storage: str, step: int | None, uri: str | None) -> ServedModel:
    """The model that is meant, once its digests were checked. Raises EvaluationError where a file differs."""
    found = find_model(name, storage, step, uri, [])
    version: ModelVersion | None = found.version
    called = f"{version.model}-{version.version}" if version else found.job.name
    check_files(found.path, version)
    return ServedModel(called, found.path, found.job, version.version if version else None)


def check_files(path: str, version: ModelVersion | None) -> None:
    """Every file is as it was registered or, of an export, as it was written. Raises EvaluationError."""
    folder = Folder(path)
    if version:
        bad = [f"{one.file} {one.state}" for one in verify_files(version) if one.state != "ok"]
    else:
        known = Provenance.model_validate_json(folder.read_bytes(PROVENANCE)).files if folder.exists(PROVENANCE) else {}
        bad = [f"{name} differs" for name, file in known.items()
               if not folder.exists(name) or digest_file(folder, name) != file]  # fmt: skip
    if bad:
        raise EvaluationError(f"{path} is not as it was written: {', '.join(bad)}; `tuneyard export` writes it again")


def vllm_line(model: ServedModel, host: str, port: int) -> str:
    """The command that serves the same folder with vLLM."""
    words = ["vllm", "serve", model.path, "--served-model-name", model.name, "--host", host, "--port", str(port)]
    return shlex.join(words + (["--trust-remote-code"] if model.job.model.trust_remote_code else []))
