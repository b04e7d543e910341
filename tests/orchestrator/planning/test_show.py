"""`tuneyard show`: the tokens that the shards hold, the targets that the loss asks for, and what was cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.planning.notes import chat_notes
from orchestrator.planning.show import SHORT, STRETCH, examples, first_example, in_short, spelled, view
from tests.tiny import film_rows, make_bert, make_llama, shard_locally, tiny_job, write_rows
from tests.trainers.tasks.small import small_jobs
from trainers.errors import JobError
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.shards.shown import ShownToken
from trainers.storage import Folder
from trainers.tasks.losses import IGNORE


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Any:
    folder = tmp_path_factory.mktemp("show")
    rows = [chat("is it good?", "the film is good"), chat("a?"), chat("so?", "the plot is bad " * 40), chat("b", "c")]
    job = tiny_job(folder, make_llama(folder / "model", tiny_chat_tokenizer), "sft", [chat("a", "b")])
    train = write_rows(folder / "rows.jsonl", rows)
    return job.model_copy(update={"data": job.data.model_copy(update={"train": (str(train),), "max_length": 64})})


def test_a_row_is_spelled_out_with_its_targets(job: Any, tmp_path: Path) -> None:
    (shown,) = examples(job)
    assert (shown.row, shown.outcome, shown.position) == (0, "kept", 0)
    targets = "".join(token.text for token in shown.tokens if token.target)
    assert targets == "the film is good<|im_end|>"
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    plain = CliRunner().invoke(app, ["show", str(file), "--row", "0"])
    assert plain.exit_code == 0 and "⟦the film is good<|im_end|>⟧" in plain.stdout and "┃" in plain.stdout
    told = json.loads(CliRunner().invoke(app, ["show", str(file), "--row", "3", "--json"]).stdout)
    assert [one["row"] for one in told] == [3] and {"id", "text", "target"} <= set(told[0]["tokens"][0])


def test_what_was_cut_and_what_was_dropped_are_shown(job: Any) -> None:
    (cut,) = examples(job, reason="truncated")
    assert cut.row == 2 and cut.tokens_lost > 0 and len(cut.tokens) == 64
    said = "".join(token.text for token in cut.tokens) + cut.cut
    assert said.count("the plot is bad") == 40
    (dropped,) = examples(job, reason="no_target")
    assert dropped.row == 1 and dropped.outcome == "dropped:no_target" and not dropped.tokens
    assert [one.row for one in examples(job, number=3)] == [one.row for one in examples(job, number=3)]
    assert len(examples(job, number=9)) == 4
    for asked in ({"row": 4}, {"reason": "malformed"}):
        with pytest.raises(JobError, match=r"no such row|has that outcome"):
            examples(job, **asked)


def test_the_documents_of_a_pack_are_those_of_the_epoch(job: Any, tmp_path: Path) -> None:
    rows = [
        chat("is it good?", "the film is good"),
        chat("a", "b"),
        chat("so?", "the plot is bad " * 40),
        chat("b", "c"),
    ]
    train, data = str(write_rows(tmp_path / "t.jsonl", rows)), {"train": (), "packing": True}
    packed = job.model_copy(
        update={"storage": str(tmp_path), "data": job.data.model_copy(update=data | {"train": (train,)})}
    )
    with pytest.raises(JobError, match="once the shards are written"):
        view(packed).packs()
    assert examples(packed)[0].packs == ()
    shards = shard_locally(packed)
    packs, held = view(packed).packs(), ShardSet(shards_folder(Folder(packed.storage), shards.train.key), shards.train,
                                                 job_task(packed, shards.train))  # fmt: skip
    shown = [packs.show(number) for number in range(len(packs.index))]
    assert len(shown) < len(held) == sum(len(pack.documents) for pack in shown)
    for pack in shown:
        members = [held.row(place).input_ids.tolist() for place in packs.index.pack(pack.pack)]
        assert [[token.id for token in document.tokens] for document in pack.documents] == members
    for number, (row,) in enumerate(examples(packed, row=number) for number in range(4)):
        (pack,) = row.packs
        (own,) = [one for one in shown[pack].documents if one.position == row.position]
        assert [token.id for token in own.tokens] == [token.id for token in row.tokens], number
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(packed.model_dump(mode="json")))
    pack = next(pack for pack in shown if len(pack.documents) > 1)
    plain = CliRunner().invoke(app, ["show", str(file), "--pack", str(pack.pack)]).stdout
    assert plain.count("┃") == len(pack.documents) and "⟦" in plain
    told = json.loads(CliRunner().invoke(app, ["show", str(file), "--pack", str(pack.pack), "--json"]).stdout)
    assert told == pack.model_dump(mode="json")
    for wrong, reason in ((packed, "an epoch has"), (job.model_copy(update={"data": job.data.model_copy(
        update={"packing": False})}), "does not pack")):  # fmt: skip
        with pytest.raises(JobError, match=reason):
            view(wrong).packs().show(99)


def test_the_first_example_is_told_in_short(job: Any) -> None:
    first = first_example(view(job))
    assert first and first.row == 0 and "⟦the film is good<|im_end|>⟧" in in_short(first)
    assert first_example(view(job)) is not None and "\n" not in in_short(first)
    rows = [chat("a"), chat("b", "the plot is bad " * 40)]
    train = write_rows(Path(job.storage).parent / "late.jsonl", rows)
    later = first_example(view(job.model_copy(update={"data": job.data.model_copy(update={"train": (str(train),)})})))
    assert later and later.row == 1 and " … " in in_short(later) and len(in_short(later)) < SHORT + STRETCH + 10


def test_marks_close_at_borders_and_at_the_end() -> None:
    pieces = [("a", False, True), ("b", True, False), ("c", True, True), ("d", False, False), ("e", True, False)]
    tokens = [ShownToken(id=0, text=text, target=target, begins=begins) for text, target, begins in pieces]
    assert spelled(tokens, colour=False).plain == "┃a⟦b⟧┃⟦c⟧d⟦e⟧"
    assert spelled(tokens, colour=True).plain == "┃ab┃cde"


def test_every_task_shows_the_targets_of_its_batches(tmp_path: Path) -> None:
    """The tokens are those of the shards; as many are targets as the shards count, where targets are tokens."""
    for name, job in small_jobs(tmp_path).items():
        shards = shard_locally(job)
        held = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, job_task(job, shards.train))
        (shown,) = examples(job)
        first, ids = held.row(0), [token.id for token in shown.tokens]
        targets = [place for place, token in enumerate(shown.tokens) if token.target]
        if job.task == "mlm":
            assert len(ids) == len(first.input_ids), name
        else:
            assert ids[: len(first.input_ids)] == first.input_ids.tolist(), name
        if job.task in ("sft", "pretrain", "mlm", "seq2seq", "tag"):
            assert len(targets) == held.targets[0], name
        if job.task in ("sft", "pretrain"):
            labels = job_task(job, shards.train).collate([[first]], 0).labels[0]
            assert [place - 1 for place in targets] == [place for place, one in enumerate(labels) if one != IGNORE]


def test_words_are_shown_with_the_blanks_between_them(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(8))
    (shown,) = examples(job)
    text = "".join(token.text for token in shown.tokens)
    assert text == "[CLS] the film is [UNK] bad . [SEP]" and "label: " in in_short(shown)


def test_a_template_without_an_end_of_turn_is_told(job: Any) -> None:
    assert chat_notes(job, job.model.path) == []
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    changed = job.model_copy(update={"data": job.data.model_copy(update={"chat_template": endless})})
    (note,) = chat_notes(changed, job.model.path)
    assert "does not learn to stop" in note


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}",
            "ends turns with 'END', which is no token",
        ),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "writes today's date"),
    ],
)
def test_what_to_know_of_a_template_is_told(template: str, said: str, job: Any) -> None:
    changed = job.model_copy(update={"data": job.data.model_copy(update={"chat_template": template})})
    (note,) = chat_notes(changed, job.model.path)
    assert said in note
