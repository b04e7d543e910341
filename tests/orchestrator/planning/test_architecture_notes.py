"""The plan says whether the tests know a job's family of models."""

import json
from pathlib import Path

from orchestrator.planning.notes import architecture_notes
from tests.tiny import checked, film_rows, make_bert, make_llama, tiny_job


def test_the_family_is_known_known_with_other_tasks_or_unknown(
    tmp_path: Path, tiny_tokenizer: Path, tiny_chat_tokenizer: Path
) -> None:
    llama, bert = make_llama(tmp_path / "llama", tiny_chat_tokenizer), make_bert(tmp_path / "bert", tiny_tokenizer)
    job = checked(tiny_job(tmp_path / "a", llama, "pretrain", film_rows(20)))
    assert "llama is in docs/models.md with task pretrain" in architecture_notes(job)
    pairs = [{"source": row["text"], "target": row["text"]} for row in film_rows(20)]
    job = checked(tiny_job(tmp_path / "b", bert, "seq2seq", pairs))
    assert "bert is in docs/models.md, but not with task seq2seq: `tuneyard verify` tests it" in architecture_notes(job)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "newest"}))
    (note,) = architecture_notes(job)
    assert note.startswith("newest is not among the ") and "`tuneyard verify` tests it" in note
