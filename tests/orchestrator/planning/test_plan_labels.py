"""The plan tells the labels in the order of the logits, once the shards are written."""

import json
from pathlib import Path

from orchestrator.planning.plan import plan_job
from tests.tiny import checked, make_bert, shard_locally, tiny_job


def test_the_plan_tells_the_labels_of_the_logits(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    rows = [{"text": "the film is good", "label": index % 12} for index in range(60)]
    job = tiny_job(tmp_path, model, "classify", rows)
    assert plan_job(checked(job)).labels is None
    shard_locally(job)
    assert json.loads(plan_job(checked(job)).model_dump_json())["labels"] == [str(number) for number in range(12)]
