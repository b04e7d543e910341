"""`tuneyard serve` as a process: what it answers, what it refuses, and how the champion is exchanged."""

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.commands.serve import served_model, vllm_line
from orchestrator.registry.manage import pick_version, promote
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.register import register
from orchestrator.serving import apps
from orchestrator.serving.apps import ServedModel, build_app, close_app
from orchestrator.training.node_report import free_port
from tests.forked import Command, run_command, start_command
from tests.orchestrator.commands.test_chat import make_talker
from tests.tiny import chat_rows, film_rows, make_bert, make_llama, shard_locally, tiny_job
from trainers.evaluation import placement
from trainers.run.folder import Evaluation
from trainers.run.record import Run, find_run

ROWS = [{"text": "the film is good"}, {"text": "a plot"}, {"text": 3}]


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Path) -> Run:
    """A run whose steps 3 and 6 are registered as versions 1 (the champion) and 2."""
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    run = find_run(job)
    run.folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    for step in (3, 6):
        export = run.folder / "export" / f"step-{step:08d}"
        torch.manual_seed(step)
        run.load_task().load_model(job.model.path, pad_id=0, trust_remote_code=False).save_pretrained(export.path)
        for file in tiny_tokenizer.iterdir():
            shutil.copy(file, export.path / file.name)
        best = Evaluation(step=step, status="done", metrics={"accuracy": 0.5}, eval_key="e")
        register(job, run.folder, best, export, {}, Promotion(promote=step == 3, reason="test"))
    return run


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[str, Command]]:
    """The address of a server that answers."""
    port = free_port()
    server, address = start_command(["serve", *words, "--port", str(port)], folder), f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address), server)
        yield address, server
    finally:
        server.process.terminate()
        server.finish()


def wait_for(reached: Callable[[], bool], server: Command) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert server.process.is_alive() and time.monotonic() < deadline, server.err.read_text()
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        return bool(ask(f"{address}/health")["status"] == "ok")
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(url: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def export_says(folder: Path) -> list[float]:
    """The probability of the likelier label of each good row, by plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in ROWS if isinstance(row["text"], str)]
    with torch.no_grad():
        said = [model(**tokenizer([text], return_tensors="pt")).logits.double().softmax(-1).max() for text in texts]
    return [float(one) for one in said]


def test_the_champion_is_exchanged_without_a_dropped_request(run: Run, tmp_path: Path) -> None:
    """Version 1 answers as its export does, then version 2 as its own; requests come all the time."""
    storage, seen, faults, over = run.job.storage, [], [], threading.Event()

    def call(address: str) -> None:
        while not over.is_set():
            try:
                seen.append(ask(f"{address}/predict", rows=ROWS))
            except Exception as error:
                faults.append(error)

    with serving(tmp_path, "tiny@champion", "--storage", storage) as (address, server):
        callers = [threading.Thread(target=call, args=(address,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        try:
            wait_for(lambda: len(seen) > 5, server)
            promote(registry_uri(storage), pick_version(registry_uri(storage), "tiny", "2"))
            wait_for(lambda: seen[-1]["version"] == 2, server)
        finally:
            over.set()
            for caller in callers:
                caller.join()
        assert ask(f"{address}/health")["model"] == "tiny-2"
    assert faults == []
    for version, step in ((1, 3), (2, 6)):
        said = next(one["predictions"] for one in seen if one["version"] == version)
        assert said[2] == {"error": "malformed"} or "error" in said[2]
        wanted = export_says(run.folder.path / "export" / f"step-{step:08d}")
        assert [one["probability"] for one in said[:2]] == pytest.approx(wanted, abs=1e-6)


def test_columns_are_read_as_in_files(tmp_path: Path) -> None:
    """With dots, by the task's own names, and where two fields have each other's name."""
    job = tiny_job(tmp_path, tmp_path, "seq2seq", [{"source": "a", "target": "b"}])

    def read(columns: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
        data = job.data.model_copy(update={"columns": columns})
        return apps._fields(job.model_copy(update={"data": data}), row)

    assert read({"source": "translation.en"}, {"translation": {"en": "a", "de": "b"}, "id": 1}) == {
        "source": "a",
        "id": 1,
    }
    assert read({"source": "translation.en"}, {"source": "a"}) == {"source": "a"}
    assert read({"source": "translation.en"}, {"translation.en": "a"}) == {"source": "a"}
    assert read({"source": "target"}, {"target": "a"}) == {"source": "a"}


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = ["serve", "tiny@champion", "--storage", run.job.storage, "--port", str(port)]
        done = run_command(words, tmp_path)
    assert done.returncode == 3 and f"cannot listen at 127.0.0.1:{port}" in done.stderr and not done.stdout


def test_a_file_with_one_other_bit_is_not_served(run: Run, tmp_path: Path) -> None:
    weights = run.folder.path / "export" / "step-00000003" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run_command(["serve", "tiny@champion", "--storage", run.job.storage], tmp_path)
    assert done.returncode == 6 and "model.safetensors digest" in done.stderr
    assert "answers" not in done.stdout


def test_a_causal_model_answers_as_openais_server(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    pytest.importorskip("openai")
    job = tiny_job(tmp_path, make_llama(tmp_path / "model", tiny_chat_tokenizer), "sft", chat_rows(10))
    made = tmp_path / "runs" / "tiny-0badcafe"
    made.mkdir(parents=True)
    (made / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    talker = make_talker(made / "export" / "step-00000003", tiny_chat_tokenizer)
    asked = {"model": "whatever", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    with serving(tmp_path, str(talker)) as (address, server):
        said = ask(f"{address}/v1/chat/completions", **asked)
        assert said["choices"][0]["message"]["content"] == "AB"
        assert [one["id"] for one in ask(f"{address}/v1/models")["data"]] == ["tiny"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(f"{address}/load_model", model="somebody/else")
        assert vllm_line(served_model(str(talker), "runs", None, None), "127.0.0.1", 8000) == (
            f"vllm serve {talker} --served-model-name tiny --host 127.0.0.1 --port 8000"
        )
        assert "vllm serve" in server.out.read_text()


def test_a_model_that_no_device_holds_is_spread_and_served(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights wait on disk, where no tensor is on a device; requests go to the one that computes."""
    pytest.importorskip("openai")
    testclient = pytest.importorskip("starlette.testclient")
    job = tiny_job(tmp_path, make_llama(tmp_path / "model", tiny_chat_tokenizer), "sft", chat_rows(10))
    talker = make_talker(tmp_path / "talker", tiny_chat_tokenizer)
    monkeypatch.setattr(placement, "device_memory", lambda device: {"cpu": 1000})
    served = build_app(ServedModel("tiny", str(talker), job))
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    with testclient.TestClient(served) as client:
        said = client.post("/v1/chat/completions", json=asked).json()
    close_app(served)
    assert said["choices"][0]["message"]["content"] == "AB"


def test_served_logits_are_those_of_the_export(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' server gives no logprobs, so the model that answers is watched: every bit, token by token."""
    pytest.importorskip("openai")
    from fastapi.testclient import TestClient
    from transformers import AutoModelForCausalLM

    export = make_llama(tmp_path / "export", tiny_chat_tokenizer, seed=3)
    job = tiny_job(tmp_path, export, "sft", chat_rows(10))
    load, seen = AutoModelForCausalLM.from_pretrained, []

    def note(module: Any, words: Any, named: dict[str, Any], said: Any) -> None:
        seen.append((named["input_ids"].clone(), said.logits.clone()))

    def watched(*words: Any, **named: Any) -> Any:
        model = load(*words, **named)
        model.register_forward_hook(note, with_kwargs=True)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    client = TestClient(build_app(ServedModel("tiny", str(export), job)))
    asked = {"model": "x", "messages": [{"role": "user", "content": "is it good"}], "max_tokens": 5, "temperature": 0}
    assert client.post("/v1/chat/completions", json=asked).status_code == 200
    plain = load(str(export), dtype="auto").eval()
    wanted = plain.generate(
        seen[0][0], max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits
    assert len(wanted) == len(seen) > 1
    for export_says, (_, served) in zip(wanted, seen, strict=True):
        assert torch.equal(export_says, served[:, -1])
