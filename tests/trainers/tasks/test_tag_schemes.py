"""Tags of any scheme are read as the entities that they mark, and written as BIO or BIOES."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import check_labels, shards_folder
from trainers.storage import Folder
from trainers.tasks.tag_schemes import find_entities, in_scheme, normalized, write_tags

CASES = {
    "BIO": ("B-x I-x O B-y", "B-x I-x O B-y", None),
    "BIOES": ("B-x E-x O S-y", "B-x E-x O S-y", "tags in BIOES"),
    "BILOU": ("B-x I-x L-x O U-y", "B-x I-x E-x O S-y", "written as BIOES"),
    "BMES": ("B-x M-x E-x O S-y", "B-x I-x E-x O S-y", "written as BIOES"),
    "IO": ("I-x I-x O I-y", "B-x I-x O B-y", "written as BIO"),
    "IOB1": ("I-x B-x I-x O", "B-x B-x I-x O", "written as BIO"),
    "plain": ("B I O B", "B-ENTITY I-ENTITY O B-ENTITY", "written as ENTITY"),
    "plain IO": ("I I O", "B-ENTITY I-ENTITY O", "written as BIO"),
    "both": ("B-x I-x O S-y", "B-x I-x O B-y", "written as BIO"),
    "nothing": ("O O", "O O", None),
}


@pytest.mark.parametrize("case", CASES)
def test_each_scheme_becomes_bio_or_bioes(case: str) -> None:
    tags, expected, note = CASES[case]
    found, said = normalized(tags.split())
    assert " ".join(found) == expected and (said is None) == (note is None) and (note or "") in (said or "")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_entities_survive_either_scheme(drawn: list[tuple[str, int, int]]) -> None:
    entities, at = [], 0
    for kind, length, gap in drawn:
        entities.append((kind, at, at + length))
        at += length + gap
    bio, bioes = write_tags(at, entities, ends=False), write_tags(at, entities, ends=True)
    assert find_entities(bio) == find_entities(bioes) == entities
    assert in_scheme(bio, True) == bioes and in_scheme(bioes, False) == bio
    assert normalized(bio)[0] == bio and normalized(bioes)[0] == (bioes if entities else bio)


def tagged(path: Path, *rows: str) -> Path:
    lines = [{"tokens": ["the"] * len(row.split()), "tags": row.split()} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("train", "held_out", "labels", "read"),
    [
        (["B-x I-x", "O B-x"], ["S-x O", "B-x E-x"], "B-x I-x O", [["B-x", "O"], ["B-x", "I-x"]]),
        (["B-x E-x", "O S-x"], ["B-x O", "B-x I-x"], "B-x E-x O S-x", [["S-x", "O"], ["B-x", "E-x"]]),
        (["S-x O", "B-y I-y"], ["B-y", "S-y"], "B-y I-y O S-x E-y S-y", [["S-y"], ["S-y"]]),
        (["I-x O"], ["U-x"], "B-x O", [["B-x"]]),
    ],
)
def test_rows_of_several_schemes_are_of_the_one_of_the_labels(
    train: list[str], held_out: list[str], labels: str, read: list[list[str]], tmp_path: Path, make_job: Any,
    shard_here: Any,
) -> None:  # fmt: skip
    job = make_job("tag", train=[tagged(tmp_path / "t.jsonl", *train)], eval=[tagged(tmp_path / "e.jsonl", *held_out)])
    shards = shard_here(job)
    check_labels(shards)
    task: Any = job_task(job, shards.train)
    assert task.labels == tuple(labels.split())
    rows = ShardSet(shards_folder(Folder(job.storage), shards.eval.key), shards.eval, task)
    assert [task._tags(rows.row(index)) for index in range(len(rows))] == read
    batch = task.collate([[rows.row(index)] for index in range(len(rows))], 0)
    assert (batch.labels >= 0).sum() == rows.targets.sum()


def test_words_without_tokens_keep_their_row(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"tokens": ["", "the", " ", "film", ""], "tags": ["B-x", "B-x", "I-x", "O", "B-x"]},
        {"tokens": ["", " "], "tags": ["O", "O"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_job("tag", train=[path], eval=[path], max_drop_fraction=0.5)
    manifest = shard_here(job).train
    assert manifest.outcomes == {"kept": 1, "dropped:no_target": 1} and manifest.total("targets") == 2
    task: Any = job_task(job, manifest)
    shards = ShardSet(shards_folder(Folder(job.storage), manifest.key), manifest, task)
    row = shards.row(0)
    assert row.extra["starts"] == [-1, 1, -1, 2] and len(row.extra["tags"]) == 5
    (line,) = task.collate([[row]], 0).labels.tolist()
    assert [task.labels[number] for number in line if number >= 0] == ["B-x", "O"]
    guesses = __import__("numpy").array([0] * len(row.input_ids))
    assert task.predicted_tags(guesses, row) == ["O", "B-x", "O", "B-x", "O"]


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_tokenizers_see_the_blank_before_a_word(
    prefix: bool, tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    from shutil import copytree

    from trainers.tokenizer.encoder import Encoder, read_spec

    folder = copytree(tiny_chat_tokenizer, tmp_path / "model")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = prefix
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    encoder = Encoder(read_spec(folder))
    words = ["the", "film", "is", ",", "good"]
    ((encoding, lost),) = encoder.encode_words([words], 64)
    (text,) = encoder.encode([" ".join(words)])
    assert encoding.ids == text.ids and lost == 0
    assert [word for word in dict.fromkeys(encoding.word_ids) if word is not None] == [0, 1, 2, 3, 4]


def spelled(name: str) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer of tokenizers that write a blank as ▁, and those that drop it."""
    from tokenizers import normalizers as n
    from tokenizers import pre_tokenizers as p

    kind, _, scheme = name.partition("-")
    return {
        "metaspace": lambda: (None, p.Metaspace(prepend_scheme=scheme)),
        "whole": lambda: (None, p.Metaspace(prepend_scheme=scheme, split=False)),
        "gemma": lambda: (n.Replace(" ", "▁"), p.Split(" ", "merged_with_previous")),
        "llama": lambda: (n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")]), None),
        "dropped": lambda: (n.Lowercase(), p.Whitespace()),
    }[kind]()


@pytest.mark.parametrize(
    "name", [*(f"{kind}-{scheme}" for kind in ("metaspace", "whole") for scheme in ("never", "first", "always")),
             "gemma", "llama", "dropped"]
)  # fmt: skip
def test_words_have_the_tokens_of_running_text(name: str) -> None:
    from tokenizers import Tokenizer, models

    from trainers.tokenizer.encoder import Encoder, TokenizerSpec

    merges = [("i", "n"), ("▁", "in"), ("▁", "p"), ("▁p", "a"), ("▁pa", "ris"), ("r", "i"), ("ri", "s")]
    known = dict.fromkeys([*"▁adpinrsley.,\u3000", *(a + b for a, b in merges)])
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(known)}, merges))
    backend.normalizer, backend.pre_tokenizer = spelled(name)
    encoder = Encoder(TokenizerSpec("", False, backend.to_str(), None, 0))
    words = ["ada", "is", "in", "paris", ",", "in", "\u3000", "in", "\u3000paris"]
    words = [word for word in words if name != "dropped" or "\u3000" not in word]
    ((encoding, lost),) = encoder.encode_words([words], 64)
    (text,) = encoder.encode([" ".join(words)])
    assert encoding.ids == text.ids and lost == 0
    assert [word for word in dict.fromkeys(encoding.word_ids) if word is not None] == [*range(len(words))]
    spelling = ["".join(token for token, own in zip(encoding.tokens, encoding.word_ids, strict=True) if own == place)
                for place in range(len(words))]  # fmt: skip
    assert [spelt.removeprefix("▁") for spelt in spelling] == words
