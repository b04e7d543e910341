"""The ledger of a run: counts, rows by reason, what a mixture takes, and the row behind every token of a step."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.ledger import ledger_report
from orchestrator.sharding.stage import write_shards
from tests.orchestrator.sharding.test_shard_stage import open_train, text_job, texts
from tests.tiny import checked, make_llama
from tests.tiny import write_rows as write
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.batching.trace import trace_step
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.run.folder import run_folder
from trainers.shards.manifest import Shards
from trainers.sources import readers
from trainers.storage import Folder
from trainers.tokenizer.encoder import load_encoder

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_ledger_shows_counts_rows_and_the_origin_of_every_token(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "UNIT_BYTES", 3000)
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    path = write(tmp_path / "t.jsonl", texts(80))
    with path.open("a") as stream:
        stream.write("torn\n" * 3 + '{"text": ""}\n' + json.dumps({"text": "the plot " * 60}) + "\n")
    job = text_job(tmp_path, model, train=[str(path)], eval=[str(path)], max_drop_fraction=0.1)
    shards = write_shards(checked(job, model))
    run = open_run(job, shards)
    report = ledger_report(job, run, "malformed", 2)
    assert report["splits"][0]["outcomes"]["dropped:malformed"] == 3 and report["tokenizer"] == "gigatoken"
    rows = [row for row in report["rows"] if row["split"] == "train"]
    assert [path.read_bytes()[row["row"] :].split(b"\n")[0] for row in rows] == [b"torn"] * 3
    done = CliRunner().invoke(app, ["ledger", str(run), "--reason", "empty_text", "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["rows"]) == 2
    table = CliRunner().invoke(app, ["ledger", str(run), "--reason", "malformed", "--step", "1"])
    assert "malformed" in table.stdout and str(path.name) in table.stdout.replace("\n", "")
    held = open_train(job, shards)
    packs = index_packs(job, held)
    order = job_order(job, len(packs))
    shown: dict[int, dict[int, list[int]]] = {}
    for step in range(1, order.steps + 1):
        sequences = [
            np.concatenate([held.row(index).input_ids for index in packs.pack(sequence).tolist()])
            for sequence in order.step(step - 1).tolist()
        ]
        ends = [0] * len(sequences)
        for piece in trace_step(held, packs, order, step):
            assert piece.start == ends[piece.sequence] and piece.file == str(path)
            ends[piece.sequence] = piece.end
            parts = shown.setdefault(piece.row, {})
            assert piece.part not in parts
            parts[piece.part] = sequences[piece.sequence][piece.start : piece.end].tolist()
        assert ends == [len(ids) for ids in sequences]
    assert sum(map(len, shown.values())) == shards.train.total("rows")
    assert max(map(len, shown.values())) > 1, "no row was split"
    encoder = load_encoder(str(model))
    for row, parts in shown.items():
        text = json.loads(path.read_bytes()[row:].split(b"\n")[0])["text"]
        ids = [number for part in sorted(parts) for number in parts[part]]
        assert ids == [*encoder.encode_ids([text])[0].tolist(), encoder.eos_id]


def test_the_ledger_shows_what_a_mixture_takes_of_each_part(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    paths = [write(tmp_path / f"{name}.jsonl", texts(count)) for name, count in (("a", 40), ("b", 20), ("c", 30))]
    mixed = [{"path": str(paths[0]), "weight": 0.5}, {"path": str(paths[1]), "weight": 3.0},
             {"path": str(paths[2]), "tokens": 500}]  # fmt: skip
    job = text_job(tmp_path, model, train=mixed, eval=[str(paths[0])])
    shards = write_shards(checked(job, model))
    run = open_run(job, shards)
    parts = ledger_report(job, run, None, None)["mixture"]
    assert [one["path"] for one in parts] == [str(path) for path in paths]
    assert parts[1]["rows_drawn"] == 3 * parts[1]["rows"] and parts[0]["rows_drawn"] == round(parts[0]["rows"] / 2)
    assert 400 < parts[2]["tokens_drawn"] <= 500 < parts[2]["tokens"]
    held = open_train(job, shards)
    packs = index_packs(job, held)
    assert sum(one["rows_drawn"] for one in parts) == len(packs.rows)
    assert sum(one["tokens_drawn"] for one in parts) == int(packs.sums(held.lengths).sum())
    result = CliRunner().invoke(app, ["ledger", str(run)])
    shown = result.stdout
    assert result.exit_code == 0, result.output
    assert "mixture: what an epoch shows" in shown and str(parts[2]["tokens_drawn"]) in shown


def open_run(job: Job, shards: Shards) -> Folder:
    """The run folder of a job whose data stage alone has run."""
    found = find_model(job)
    assert found is not None
    run = run_folder(job, found.digest, shards)
    run.write_bytes("job.yaml", json.dumps(job.model_dump(mode="json")).encode())
    return run
