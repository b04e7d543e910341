"""Every task and mode end to end on tiny models: shards, two ranks of ZeRO-3, export, evaluation; better than a trivial
answer. One launch trains them all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.peer import train_peer
from tests.ranks import run_ranks
from tests.tiny import load_written
from tests.trainers.tasks import small
from tests.trainers.training.test_training import train_all
from trainers.checkpoint.export import export_checkpoint
from trainers.evaluation.evaluate import combine, evaluate_model, score_share
from trainers.job.schema import Job
from trainers.job.sections import GenerateSection
from trainers.run.folder import step_name
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder
from trainers.tasks.base import IGNORE
from trainers.tokenizer.encoder import load_encoder

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Trained:
    """What is left of a job that ran."""

    job: Job
    losses: dict[int, float]
    metrics: dict[str, float]
    row_scores: dict[str, Any]


def held_out(job: Job) -> tuple[Any, ShardSet]:
    shards = load_written(job)
    assert shards is not None
    task = job_task(job, shards.train)
    return task, ShardSet(shards_folder(Folder(job.storage), shards.eval.key), shards.eval, task)


def export(job: Job, run: str = "run") -> str:
    task, _ = held_out(job)
    folder = Folder(job.storage) / "runs" / run
    out = folder / "export"
    assert job.train.steps is not None
    export_checkpoint(folder / "checkpoints" / step_name(job.train.steps), out, job, task, job.model.path)
    return str(out.path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    jobs = small.small_jobs(tmp_path_factory.mktemp("tasks"))
    losses = run_ranks(train_all, 2, [(job, "run", None) for job in jobs.values()])[0]
    found = {}
    for (name, job), by_step in zip(jobs.items(), losses, strict=True):
        task, shards = held_out(job)
        rows, row_scores = evaluate_model(job, task, export(job), shards)
        assert len(rows) == shards.manifest.rows_in
        found[name] = Trained(job, by_step, task.metrics(row_scores), row_scores)
    return found


def test_every_loss_falls(trained: dict[str, Trained]) -> None:
    rises = {name: one.losses for name, one in trained.items() if one.losses[max(one.losses)] > 0.9 * one.losses[1]}
    assert rises == {}


@pytest.mark.parametrize("name", sorted(small.SAME_AS_TRAINER))
def test_training_takes_the_steps_of_transformers_trainer(
    trained: dict[str, Trained], name: str, tmp_path: Path
) -> None:
    """The same rows in the same order, no dropout: the model class's own loss, torch's AdamW and the Trainer's loop in
    one process give the losses of two ranks of ZeRO-3. Later steps differ more, as rounding grows."""
    one = trained[name]
    peer = train_peer(one.job, tmp_path, in_order=True, stop_after=6)
    early, late = ({step: one.losses[step] for step in steps} for steps in ((1, 2, 3), (4, 5, 6)))
    assert {step: peer[step] for step in early} == pytest.approx(early, rel=1e-5)
    assert {step: peer[step] for step in late} == pytest.approx(late, rel=1e-3)


@pytest.mark.parametrize("name", ["mlm", "mlm whole words", "pretrain"])
def test_language_models_beat_the_most_frequent_token(trained: dict[str, Trained], name: str) -> None:
    one = trained[name]
    _, shards = held_out(one.job)
    counts = Counter(int(token) for index in range(len(shards)) for token in shards.row(index).input_ids)
    assert one.metrics["token_accuracy"] > max(counts.values()) / sum(counts.values()) + 0.1
    assert one.metrics["perplexity"] == pytest.approx(math.exp(one.metrics["loss"]))


@pytest.mark.parametrize("name", ["pretrain", "mlm", "mlm whole words"])
def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes_of_the_targets(
    trained: dict[str, Trained], name: str
) -> None:
    one = trained[name]
    task, shards = held_out(one.job)
    encoder = load_encoder(one.job.model.path)
    task.prepare(encoder)
    held = 0
    for index in range(len(shards)):
        row = shards.row(index)
        labels = task.collate([[row]], encoder.pad_id).labels
        targets = row.input_ids[1:] if name == "pretrain" else labels[labels != IGNORE]
        assert len(targets) == (labels != IGNORE).sum() > 0
        tokens = encoder.tokenizer.convert_ids_to_tokens(targets.tolist())
        held += sum(len(token.encode()) for token in tokens if token not in encoder.tokenizer.all_special_tokens)
    assert int(one.row_scores["bytes"].sum()) == held
    bits = float(one.row_scores["loss_sum"].sum()) / math.log(2)
    assert one.metrics["bits_per_byte"] == pytest.approx(bits / held)


def test_answers_are_generated_and_compared_where_the_job_asks(trained: dict[str, Trained]) -> None:
    """Half of the answers are the same words; a model that always gives the likelier has no more than that right."""
    one = trained["sft"]
    said = one.row_scores["said"].tolist()
    assert one.metrics["exact_match"] > 0.8 and one.metrics["rougeL"] > 0.9, said
    answers = [text for text in said if "not good" in text]
    assert 0.3 < len(answers) / len(said) < 0.7


def test_sampling_draws_the_same_for_the_same_seed(trained: dict[str, Trained]) -> None:
    one = trained["T5"]
    model = export(one.job)

    def said(seed: int, **settings: Any) -> list[str]:
        generate = GenerateSection(max_new_tokens=5, do_sample=True, **settings)
        job = one.job.model_copy(update={
            "evaluate": one.job.evaluate.model_copy(update={"generate": generate}),
            "train": one.job.train.model_copy(update={"seed": seed}),
        })  # fmt: skip
        task, shards = held_out(job)
        _, row_scores = evaluate_model(job, task, model, shards)
        texts: list[str] = row_scores["said"].tolist()
        return texts

    greedy = one.row_scores["said"].tolist()
    assert said(0, temperature=3.0) == said(0, temperature=3.0) != said(1, temperature=3.0)
    assert said(0, temperature=1e-4) == said(1, top_k=1) == greedy


def test_the_record_of_an_evaluation_says_how_bleu_was_computed(trained: dict[str, Trained], tmp_path: Path) -> None:
    from orchestrator.evaluation.task import evaluate_step
    from trainers.run.record import find_run

    run = find_run(trained["T5"].job).model_copy(update={"folder": Folder(str(tmp_path))})
    record = evaluate_step(run, 0)
    assert record.error is None and record.notes.keys() == {"bleu", "chrf"}
    assert record.notes["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


@pytest.mark.parametrize("name", ["tag", "tag BIOES"])
def test_taggers_find_the_entities_that_outside_alone_would_miss(trained: dict[str, Trained], name: str) -> None:
    metrics = trained[name].metrics
    assert min(metrics["f1"], metrics["strict_f1"], metrics["f1/per"], metrics["f1/loc"]) > 0.8


def test_extraction_beats_always_naming_the_first_word(trained: dict[str, Trained]) -> None:
    one = trained["extract"]
    _, shards = held_out(one.job)
    rows = [shards.row(index).extra for index in range(len(shards))]
    first = np.mean([row["text"].split()[0] in row["answers"] for row in rows if row["window"] == 0])
    assert one.metrics["exact"] > 80 > 150 * first
    assert one.row_scores["windows"].max() > 1  # contexts longer than a window are among them


def test_extraction_with_unanswerable_questions_knows_both(trained: dict[str, Trained]) -> None:
    metrics = trained["extract v2"].metrics
    assert metrics["exact_unanswerable"] > 80
    assert metrics["exact_answerable"] > 40
    assert metrics["best_f1"] >= metrics["f1"]


@pytest.mark.parametrize("name", ["regression", "cosine", "contrastive"])
def test_similarity_follows_the_score(trained: dict[str, Trained], name: str) -> None:
    assert min(trained[name].metrics["spearman"], trained[name].metrics["pearson"]) > 0.6


def test_multi_label_beat_giving_none_and_giving_all(trained: dict[str, Trained]) -> None:
    one = trained["several"]
    truth = np.stack([one.row_scores[f"true_{index}"] for index in range(3)], 1)
    assert one.metrics["accuracy"] > 0.4 > (truth == 0).all(1).mean()
    assert one.metrics["auroc"] > 0.7


def test_a_causal_model_classifies(trained: dict[str, Trained]) -> None:
    assert trained["classify causal"].metrics["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["T5", "Bart", "Marian"])
def test_texts_from_texts_beat_copying_the_source(trained: dict[str, Trained], name: str) -> None:
    """A copied source has no word right."""
    metrics = trained[name].metrics
    assert metrics["rouge1"] > 0.45
    assert metrics["token_accuracy"] > 0.6


def test_the_language_of_a_row_decides_what_is_said(trained: dict[str, Trained]) -> None:
    """Each word has another translation in the other language: whoever ignores it has at most half of them right."""
    assert trained["seq2seq causal"].metrics["exact_match"] > 0.8


def score_shares(job: Job, model: str) -> dict[tuple[int, int], Any]:
    """On rank r of three: share r of evaluations by as many processes as there are ranks up to it, and more."""
    rank = int(os.environ["RANK"])
    task, shards = held_out(job)
    return {(rank, count): score_share(job, task, model, shards, rank, count) for count in range(rank + 1, 4)}


def test_metrics_are_the_same_at_one_two_and_three_processes(tmp_path: Path, trained: dict[str, Trained]) -> None:
    """101 rows, which neither 2 nor 3 nor the batch divides; each share is scored in a process of its own."""
    job: Job = small.tiny_job(tmp_path, Path(trained["tag"].job.model.path), "tag", small.tag_rows(505))
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"batch_size": 8})})
    small.shard_locally(job)
    task, shards = held_out(job)
    assert len(shards) == 101
    scored_by: dict[tuple[int, int], Any] = {}
    for one in run_ranks(score_shares, 3, job, export(trained["tag"].job)):
        scored_by |= one
    found = []
    for count in (1, 2, 3):
        rows, row_scores = combine(task, [scored_by[share, count] for share in range(count)], len(shards))
        assert rows.tolist() == list(range(101))
        found.append(task.metrics(row_scores))
    assert found[0] == found[1] == found[2]


def test_a_row_that_is_missing_or_counted_twice_is_an_error(trained: dict[str, Trained]) -> None:
    from trainers.errors import EvaluationError

    job = trained["tag"].job
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"batch_size": 8})})
    task, shards = held_out(job)
    share = score_share(job, task, export(job), shards, 0, 2)
    for shares in ([share], [share, share]):
        with pytest.raises(EvaluationError, match="rows"):
            combine(task, shares, len(shards))


def test_masks_differ_between_steps_and_not_between_evaluations(trained: dict[str, Trained]) -> None:
    from trainers.tokenizer.encoder import load_encoder

    task, shards = held_out(trained["mlm"].job)
    task.prepare(load_encoder(trained["mlm"].job.model.path))
    rows = [[shards.row(index)] for index in range(8)]
    labels = [task.collate(rows, 0, draw).labels.tolist() for draw in (0, 0, 1, 2)]
    assert labels[0] == labels[1]
    assert labels[0] != labels[2] != labels[3]
    alone, together = task.collate(rows[4:5], 0, 1).labels[0], task.collate(rows, 0, 1).labels[4]
    assert alone.tolist() == together[: len(alone)].tolist()


@pytest.mark.parametrize("name", ["mlm", "mlm whole words"])
def test_the_number_of_hidden_tokens_is_known_from_the_shard(trained: dict[str, Trained], name: str) -> None:
    from trainers.tokenizer.encoder import load_encoder

    task, shards = held_out(trained[name].job)
    task.prepare(load_encoder(trained[name].job.model.path))
    for draw in range(5):
        labels = task.collate([[shards.row(index)] for index in range(len(shards))], 0, draw).labels
        assert (labels != -100).sum(1).tolist() == shards.targets.tolist()


PLAIN = """
import json, sys
import torch, transformers
assert not any(name.split(".")[0] in ("trainers", "orchestrator") for name in sys.modules)


def opened(folder, auto):
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
    return transformers.AutoTokenizer.from_pretrained(folder), model


def classes(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForSequenceClassification")
    return [model.config.id2label[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())]
            for row in rows]


def scores(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForSequenceClassification")
    return [float(model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits) for row in rows]


def tags(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForTokenClassification")
    right = []
    for row in rows:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        guesses, words = model(**inputs).logits[0].argmax(-1).tolist(), inputs.word_ids()
        named = [model.config.id2label[guesses[words.index(word)]] for word in range(len(row["tokens"]))]
        right.append(sum(ours == true for ours, true in zip(named, row["tags"])))
    return right


def losses(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForCausalLM")
    sums = []
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        sums.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
    return sums


def hidden(folder, rows):
    _, model = opened(folder, "AutoModelForMaskedLM")
    losses = []
    for row in rows:
        logits, labels = model(input_ids=torch.tensor([row["ids"]])).logits[0], torch.tensor(row["labels"])
        wanted = labels != -100
        losses.append(float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum")))
    return losses


def spans(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForQuestionAnswering")
    found = []
    for row in rows:
        windows = tokenizer(row["question"], row["context"], max_length=10, stride=2, truncation="only_second",
                            return_overflowing_tokens=True, return_offsets_mapping=True)
        best = []
        for number, offsets in enumerate(windows["offset_mapping"]):
            inputs = {name: torch.tensor([windows[name][number]]) for name in tokenizer.model_input_names}
            out, places = model(**inputs), [i for i, one in enumerate(windows.sequence_ids(number)) if one == 1]
            best += [(float(out.start_logits[0, i] + out.end_logits[0, j]), offsets[i][0], offsets[j][1])
                     for i in places for j in places if i <= j]
        score, start, end = max(best)
        found.append([score, float(row["context"][start:end] in [one["text"] for one in row["answers"]])])
    return found


def texts(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForSeq2SeqLM")
    return [tokenizer.decode(model.generate(**tokenizer(row["source"], return_tensors="pt"), max_new_tokens=20)[0],
                             skip_special_tokens=True).strip() for row in rows]


def answers(folder, rows):
    tokenizer, model = opened(folder, "AutoModelForCausalLM")
    said = []
    for row in rows:
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True,
                                              return_tensors="pt")
        ids = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1]:]
        said.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return said


with torch.no_grad():
    print(json.dumps({name: globals()[how](folder, rows) for name, how, folder, rows in json.load(sys.stdin)}))
"""
PLAINLY = {
    "classify causal": "classes",
    "regression": "scores",
    "tag": "tags",
    "pretrain": "losses",
    "mlm": "hidden",
    "extract": "spans",
    "T5": "texts",
    "sft": "answers",
}
"""How each job's predictions are had in PLAIN."""


def masked_rows(job: Job) -> list[dict[str, Any]]:
    """The evaluation rows as their masks were drawn."""
    from trainers.tokenizer.encoder import load_encoder

    task, shards = held_out(job)
    task.prepare(load_encoder(job.model.path))
    batches = [task.collate([[shards.row(index)]], 0) for index in range(len(shards))]
    return [{"ids": each.inputs["input_ids"][0].tolist(), "labels": each.labels[0].tolist()} for each in batches]


def test_a_plain_process_gives_the_predictions_that_the_evaluation_recorded(trained: dict[str, Trained]) -> None:
    """transformers alone, from the raw rows and the exported folder; of mlm, whose masks are drawn, from their ids."""
    asked = []
    for name, how in PLAINLY.items():
        job = trained[name].job
        rows = [json.loads(line) for line in Path(job.data.eval[0]).read_text().splitlines()]
        rows = masked_rows(job) if how == "hidden" else rows
        asked.append((name, how, str(Path(job.storage) / "runs" / "run" / "export"), rows))
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN], input=json.dumps(asked), capture_output=True, text=True,
                          check=False, timeout=300, cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plain = json.loads(done.stdout.splitlines()[-1])
    recorded = {name: trained[name].row_scores for name in PLAINLY}
    causal, _ = held_out(trained["classify causal"].job)
    assert plain["classify causal"] == [causal.labels[index] for index in recorded["classify causal"]["prediction"]]
    assert plain["tag"] == recorded["tag"]["words_right"].tolist()
    assert plain["pretrain"] == pytest.approx(recorded["pretrain"]["loss_sum"].tolist(), rel=1e-4)
    assert plain["mlm"] == pytest.approx(recorded["mlm"]["loss_sum"].tolist(), rel=1e-4)
    assert plain["regression"] == pytest.approx(recorded["regression"]["said"].tolist(), abs=1e-4)
    assert plain["T5"] == recorded["T5"]["said"].tolist()
    assert plain["sft"] == recorded["sft"]["said"].tolist()
    best, exact = zip(*plain["extract"], strict=True)
    assert best == pytest.approx(recorded["extract"]["score"].tolist(), abs=1e-4)
    assert list(exact) == recorded["extract"]["exact_v1"].tolist()
