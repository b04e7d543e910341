"""The model card as the Hub's own parser reads it, and a version's folder sent to a hub on loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.registry.model_card import card_text, write_card
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.register import register
from tests.orchestrator.registry.test_registry import job_of, run_of
from trainers.checkpoint.export import Provenance
from trainers.errors import EvaluationError
from trainers.run.folder import Evaluation

METRICS = {"accuracy": 0.75, "f1/some: label": 0.5, "loss": float("nan")}
BEST = Evaluation(step=20, status="done", metrics=METRICS, eval_key="e1", rows=4)
LINEAGE = {"seed": "11", "job": "name: topics\ndata:\n  train: [a]\n"}


def test_the_hubs_parser_reads_the_card(storage):
    card = ModelCard(card_text(job_of(storage, model={"path": "acme/base", "dtype": "float32"}), BEST, LINEAGE))
    assert (card.data.base_model, card.data.pipeline_tag) == ("acme/base", "text-classification")
    assert card.data.library_name == "transformers"
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == {
        "accuracy": 0.75,
        "f1/some: label": 0.5,
    }
    assert {one.dataset_name for one in card.data.eval_results} == {"eval.jsonl"}
    assert "step\n20" in card.text and "- seed: 11" in card.text
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()


def test_a_model_of_a_folder_has_no_base_that_the_hub_would_look_for(storage):
    job = job_of(storage, model={"path": "/models/base", "dtype": "float32"})
    assert ModelCard(card_text(job, BEST, LINEAGE)).data.base_model is None


class HubHandler(BaseHTTPRequestHandler):
    """What a hub answers to one commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Authorization"], body))
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            said = {"files": files}
        elif "/commit/" in self.path:
            address = f"{self.server.address}/acme/topics/commit/1"
            said = {"commitUrl": address, "commitOid": "1" * 40, "hookOutput": "", "success": True}
        else:
            said = {"url": f"{self.server.address}/acme/topics", "warnings": [], "errors": []}
        self._say(said)

    def do_GET(self):
        self._say({"id": "acme/topics", "sha": "0" * 40, "siblings": []})

    def _say(self, said):
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), HubHandler)
    server.address, server.got = f"http://127.0.0.1:{server.server_port}", []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_version_is_sent_with_its_card_unless_a_bit_is_wrong_or_nobody_answers(storage, hub, monkeypatch):
    run, job = run_of(storage), job_of(storage)
    export = run / "export" / "step-00000020"
    export.write_bytes("config.json", b"{}")
    made = Provenance(step=20, checkpoint="/somewhere", dtype="float32", train_key="k", job="j", files={})
    export.write_bytes("tuneyard.json", made.model_dump_json().encode())
    write_card(export, job, BEST, LINEAGE)
    register(job, run, BEST, export, LINEAGE, Promotion(promote=True, reason="test"))
    words = ["registry", "push", "topics", "acme/topics", "--storage", str(storage)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert "/acme/topics/commit/1" in done.stdout and "verysecret" not in done.output
    sent = {path: (token, body) for path, token, body in hub.got}
    assert json.loads(sent["/api/repos/create"][1])["visibility"] == "private"
    assert {token for token, _ in sent.values()} == {"Bearer hf_verysecret"}
    (commit,) = (body for path, (_, body) in sent.items() if "/commit/" in path)
    head, *files = [json.loads(line)["value"] for line in commit.splitlines()]
    assert head["summary"] == "topics version 1: accuracy 0.75"
    contents = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert contents == {"config.json": b"{}", "README.md": (export.path / "README.md").read_bytes()}
    count = len(hub.got)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for token, words_said in (("hf_verysecret", "did not answer for acme/topics"), (None, "set HF_TOKEN")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        refused = CliRunner().invoke(app, words)
        assert isinstance(refused.exception, EvaluationError) and words_said in str(refused.exception)
    export.write_bytes("config.json", b"[]")
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, EvaluationError) and "config.json digest" in str(refused.exception)
    assert len(hub.got) == count
