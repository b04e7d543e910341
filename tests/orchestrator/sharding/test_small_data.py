"""Small data needs no cluster: the shards are written in the driver, the same bytes, with all that the stage does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.sharding import stage
from orchestrator.sharding.stage import write_shards
from tests.orchestrator.sharding.test_shards import content, make_job, plain_job
from tests.tiny import checked, film_rows, write_rows
from trainers.errors import DataError, JobError
from trainers.job.load import parse_job
from trainers.run.folder import run_folder
from trainers.shards.contamination import contamination_name
from trainers.shards.keys import load_shards
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder

ALONE = """
import json, sys
from tests.tiny import checked
from orchestrator.sharding.stage import write_shards
from trainers.job.load import parse_job
write_shards(checked(parse_job(json.loads(sys.argv[1]))))
print([name for name in ("ray", "torch") if name in sys.modules])
"""


def test_small_data_is_sharded_without_ray(tmp_path: Path, tiny_tokenizer: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", film_rows(70))
    held = write_rows(tmp_path / "e.jsonl", film_rows(4))
    data = {"train": [str(train)], "eval": [str(held)], "dedup": "exact"}
    plain = plain_job(tmp_path, tiny_tokenizer, "alone", **data)
    command = [sys.executable, "-c", ALONE, json.dumps(plain)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "ray" not in out.stdout
    job = parse_job(plain)
    (train_key,) = (json.loads(path.read_text())["key"] for path in Path(job.storage).rglob("manifest.json")
                    if json.loads(path.read_text())["split"] == "train")  # fmt: skip
    folder = shards_folder(Folder(job.storage), train_key)
    assert any(name.startswith("contamination-") for name in folder.list())
    manifest = folder.read_json("manifest.json")
    assert manifest["shards"][0]["outcomes"]["removed:duplicate"] > 0


def test_the_bytes_are_those_of_the_cluster(
    tmp_path: Path, tiny_tokenizer: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_rows(tmp_path / "t.jsonl", film_rows(40))
    data = {"train": [str(train)], "eval": [str(train)]}
    on_cluster, here = (make_job(tmp_path, tiny_tokenizer, name, **data) for name in ("cluster", "here"))
    assert not stage.is_small(checked(on_cluster, tiny_tokenizer).splits)
    shards = write_shards(checked(on_cluster, tiny_tokenizer))
    monkeypatch.setattr(stage, "SMALL_BYTES", 2**20)
    monkeypatch.setattr(stage, "start_workers", lambda: pytest.fail("workers were started"))
    assert stage.is_small(checked(here, tiny_tokenizer).splits)
    assert write_shards(checked(here, tiny_tokenizer)) == shards and content(here) == content(on_cluster)
    assert contamination_name(shards.eval.key) in shards_folder(Folder(here.storage), shards.train.key).list()
    monkeypatch.setattr(stage, "SMALL_UNITS", 1)
    assert not stage.is_small(checked(here, tiny_tokenizer).splits)


def test_evaluation_sets_beside_are_splits_of_their_own_and_without_them_nothing_changes(
    tmp_path: Path, tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in
             (("t", film_rows(70)), ("e", film_rows(4)), ("far", film_rows(9)[5:]))}  # fmt: skip
    plain = plain_job(tmp_path, tiny_tokenizer, "sets", train=[files["t"]], eval=[files["e"]])
    alone = parse_job(plain)
    empty = parse_job({**plain, "data": {**plain["data"], "eval_sets": {}}, "evaluate": {"guards": {}, "metrics": {}}})
    sets = parse_job({**plain, "data": {**plain["data"], "eval_sets": {"far": files["far"]}}})
    assert alone.identity() == empty.identity() != sets.identity()
    before, shards = write_shards(checked(alone, tiny_tokenizer)), write_shards(checked(sets, tiny_tokenizer))
    assert (before.train, before.eval) == (shards.train, shards.eval) and not before.beside
    far = shards.beside["far"]
    assert (far.split, far.rows_in, far.sources) == ("eval_sets.far", 4, (files["far"],))
    assert "training rows say what a row of data.eval_sets.far says" in caplog.text
    assert [split.key for split in shards.all] == [plan.key for plan in checked(sets, tiny_tokenizer).splits]
    assert load_shards(sets, checked(sets, tiny_tokenizer).splits) == shards
    assert run_folder(alone, "m", before) != run_folder(sets, "m", shards)
    unknown = write_rows(tmp_path / "far.jsonl", [{"text": "the film", "label": "none"}])
    with pytest.raises(DataError, match=r"labels in data.eval_sets.far that data.train never shows: 'none'"):
        write_shards(checked(sets, tiny_tokenizer))
    unknown.unlink()
    with pytest.raises(JobError, match=r"data.eval_sets.far: .*far.jsonl"):
        checked(sets, tiny_tokenizer)
