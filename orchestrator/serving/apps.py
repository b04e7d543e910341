"""What a model answers over HTTP: a causal one as OpenAI's server would, by transformers' own; any other POST /predict.

Both have GET /health with the model's name and version. Requests name no model that is loaded: it is this one.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.errors import JobError
from trainers.evaluation.placement import load_to_answer
from trainers.evaluation.predict import Predictor, chunks
from trainers.job.schema import Job
from trainers.sources.readers import dotted_columns, pick_fields
from trainers.tasks import load_task

MOST_ROWS = 10_000
"""Of one request."""


@dataclass(frozen=True)
class ServedModel:
    """A model folder, how it is called, and the job that says what its rows look like."""

    name: str
    path: str
    job: Job
    version: int | None = None
    """In the registry."""


def is_causal(job: Job) -> bool:
    """Whether the model writes text, so that OpenAI's interface fits."""
    return load_task(job.task).auto_class.endswith("CausalLM") and job.task in ("sft", "pretrain")


def build_app(model: ServedModel) -> Any:
    """Load the model; the ASGI application that answers with it."""
    return _causal_app(model) if is_causal(model.job) else _predict_app(model)


def close_app(app: Any) -> None:
    """Let go of what an application holds beside its memory."""
    if close := getattr(app.state, "close", None):
        close()


def _told(model: ServedModel) -> dict[str, Any]:
    return {"status": "ok", "model": model.name, "version": model.version, "task": model.job.task}


def _predict_app(model: ServedModel) -> Any:
    from fastapi import Body, FastAPI, HTTPException

    job = model.job
    predictor, one_at_a_time = Predictor(job, model.path), threading.Lock()
    app = FastAPI(title=model.name)

    app.add_api_route("/health", lambda: _told(model))

    @app.post("/predict")
    def predict(rows: list[dict[str, Any]] = Body(embed=True)) -> dict[str, Any]:  # noqa: B008 - FastAPI's way
        if len(rows) > MOST_ROWS:
            raise HTTPException(413, f"{len(rows):,} rows; at most {MOST_ROWS:,} a request")
        fields = [_fields(job, row) for row in rows]
        with one_at_a_time:
            said = [one for chunk in chunks(fields) for one in predictor.say(chunk)]
        return {"model": model.name, "version": model.version, "predictions": said}

    return app


def _fields(job: Job, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns, under the names that the task has for them."""
    columns, dotted = job.data.columns, dotted_columns(job.data.columns)
    taken = {*columns.values(), *(names[0] for names in dotted.values())}
    return {name: value for name, value in row.items() if name not in taken} | pick_fields(row, columns, dotted)


def _causal_app(model: ServedModel) -> Any:
    try:
        from transformers.cli.serving.server import FastAPI  # noqa: F401 - there only where the rest is
    except ImportError:
        raise JobError("serving a causal model needs pip install 'tuneyard[serve]'") from None
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    manager, state = _manager(model), GenerationState(continuous_batching=False)
    text = [kind(model_manager=manager, generation_state=state) for kind in
            (ChatCompletionHandler, CompletionHandler, ResponseHandler, SystemOneHandler)]  # fmt: skip
    chat, completion, response, decisions = text
    app = build_server(manager, chat, completion_handler=completion, response_handler=response,
                       transcription_handler=TranscriptionHandler(manager, state), systemone_handler=decisions,
                       generation_state=state)  # fmt: skip
    offered = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models")
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") in offered]

    app.add_api_route("/health", lambda: _told(model))
    app.state.close = state.shutdown
    return app


def _manager(model: ServedModel) -> Any:
    """Transformers' manager of models with this one alone, whatever a request names."""
    from transformers import AutoTokenizer
    from transformers.cli.serving.model_manager import ModelManager

    code, scale = model.job.model.trust_remote_code, model.job.scale
    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=code)
    loaded, _ = load_to_answer(model.path, code, scale.gpus_per_worker, scale.cpus_per_worker)

    class OneModel(ModelManager):  # type: ignore[misc, unused-ignore]
        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return loaded, tokenizer

        def process_model_name(self, model_id: Any) -> str:  # type: ignore[override, unused-ignore]
            return f"{model.name}@{model.version or 'main'}"

        def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:  # type: ignore[override, unused-ignore]
            return [{"id": model.name, "object": "model", "owned_by": "tuneyard", "created": 0}]

    return OneModel()
