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
from trainers.job.load import parse_job
from trainers.shards.contamination import contamination_name
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
