"""One family in one process, no engine: its losses against plain transformers', and the self-tests on it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.architectures.families import ENCODERS, PAIRS, auto_class, write_model
from tests.peer import as_transformers, span_loss
from tests.tiny import tiny_job
from tests.trainers.tasks import small
from trainers.architecture import linear_layers, token_types
from trainers.architecture.config import WINDOWS
from trainers.errors import JobError
from trainers.model.engine import freeze_other_modalities
from trainers.tasks import Example
from trainers.tokenizer.encoder import load_encoder
from trainers.verification import gradients
from trainers.verification.checks import CHECKS
from trainers.verification.pack_probe import ask
from trainers.verification.packing import PackingDecision
from trainers.verification.precision import bf16_follows
from trainers.verification.sample import CheckContext, make_context
from trainers.verification.verdict import BF16

OF_DECODERS = ("pretrain", "sft", "classify", "tag", "extract", "seq2seq", "cosine")
OF_ENCODERS = ("mlm", "classify", "tag", "extract", "regression", "cosine")
OF_PAIRS = ("seq2seq",)
PACKED = ("pretrain", "sft")
ASKED = ("isolation", "padding", "packed_as_separate", "model_agrees", "reload")
"""Self-tests that look at the model."""


@dataclass(frozen=True)
class Cell:
    """What became of a family in a task."""

    family: str
    task: str
    packed: bool
    loss_error: float | None = None
    """Relative, of the first step's loss against plain transformers'; None where the task is refused."""

    failed: tuple[str, ...] = ()
    refused: str = ""
    beyond: bool = True
    """Whether a row was longer than the model's windows."""


def kind_of(family: str) -> str:
    return "pair" if family in PAIRS else "encoder" if family in ENCODERS else "decoder"


def tasks_of(family: str) -> tuple[str, ...]:
    return {"pair": OF_PAIRS, "encoder": OF_ENCODERS, "decoder": OF_DECODERS}[kind_of(family)]


def tokenizers(folder: Path) -> dict[str, Path]:
    """A tokenizer's folder for each kind of model; that of encoders gives token types to pairs."""
    return {
        "decoder": small.chat_tokenizer(folder / "decoder"),
        "encoder": small.word_tokenizer(folder / "encoder"),
        "pair": small.target_tokenizer(folder / "pair"),
    }


def rows_of(task: str) -> list[dict[str, Any]]:
    """Rows of unequal length, so that there is padding."""
    echo, more = small.echo_rows(40), [index % 4 for index in range(40)]
    if task in ("pretrain", "mlm"):
        return [{"text": row["text"] + " ." * count} for row, count in zip(small.plain_rows(40), more, strict=True)]
    if task == "classify":
        return [
            {"text": row["source"] + " ." * count, "label": row["source"][:3]}
            for row, count in zip(echo, more, strict=True)
        ]
    if task == "tag":
        return [{name: values + [values[-1]] * count for name, values in row.items()}
                for row, count in zip(small.tag_rows(40), more, strict=True)]  # fmt: skip
    if task == "seq2seq":
        return [{"source": row["source"] + " ." * count, "target": row["target"] + " ?" * (3 - count)}
                for row, count in zip(echo, more, strict=True)]  # fmt: skip
    if task in ("regression", "cosine"):
        pairs = small.graded_rows(40) if task == "regression" else small.pair_rows(40)
        return [{**row, "sentence1": row["sentence1"] + " ." * count} for row, count in zip(pairs, more, strict=True)]
    return small.verdict_rows(40) if task == "sft" else small.question_rows(40)


def job_of(task: str, folder: Path, model: Path, packed: bool = False, **model_options: Any) -> Any:
    """A tiny job of a task; cosine and regression are two of similarity."""
    rows = rows_of(task)
    train = {"objective": task} if task in ("regression", "cosine") else {}
    data = {"packing": packed} if task in PACKED else {"score_range": [0, 5]} if train else {}
    name = "similarity" if train else task
    job = tiny_job(folder, model, name, rows, data={"max_length": 32, **data}, train=train)
    return job.model_copy(update={"model": job.model.model_copy(update=model_options)})


class Samples:
    """A sample of every task by kind of tokenizer, made once: rows do not depend on the model."""

    def __init__(self, folder: Path, own: str) -> None:
        self.folder, self.own = folder, own
        self._made: dict[tuple[str, str, bool], CheckContext] = {}
        self.words = tokenizers(folder / own / "words")
        for name, family in (("decoder", "llama"), ("encoder", "bert"), ("pair", "bart")):
            write_model(family, folder / own / name, self.words[name])

    def model(self, family: str) -> Path:
        """A family's model, made where it is not there yet."""
        path = self.folder / "models" / family
        return path if path.exists() else write_model(family, path, self.words[kind_of(family)])

    def get(self, kind: str, task: str, packed: bool) -> CheckContext:
        key = (kind, task, packed)
        if key not in self._made:
            place = self.folder / self.own / f"{kind} {task} {packed}"
            (place / "sample").mkdir(parents=True)
            job = job_of(task, place, self.folder / self.own / kind, packed)
            self._made[key] = make_context(job, job.model.path, place / "sample")
        return self._made[key]


def keeps_apart(family: str, samples: Samples) -> PackingDecision:
    """Whether packed documents of a family see each other, and by which attention they do not."""
    path = samples.model(family)
    return ask(job_of("pretrain", samples.folder / samples.own / "ask", path), str(path))


def empty_model(family: str, samples: Samples) -> Any:
    """A family's model without weights."""
    config = transformers.AutoConfig.from_pretrained(samples.model(family))
    with torch.device("meta"):
        return auto_class(family).from_config(config)


def adapted_layers(family: str, samples: Samples) -> tuple[str, ...]:
    """Last parts of the names of the layers that get adapters by default."""
    model = empty_model(family, samples)
    freeze_other_modalities(model)
    return tuple(sorted({name.split(".")[-1] for name in linear_layers(model)}))


def look_at(family: str, samples: Samples, packing: PackingDecision | None) -> list[Cell]:
    """Every task of a family, packed where it keeps documents apart."""
    apart = packing is not None and packing.apart
    by = {"attn_implementation": packing.attention} if packing and packing.attention else {}
    kind, path = kind_of(family), samples.model(family)
    cells = []
    for task in tasks_of(family):
        for packed in (True, False) if task in PACKED and apart else (False,):
            cells.append(_look(family, str(path), task, samples.get(kind, task, packed), by if packed else {}))
    return cells


def _look(family: str, path: str, task: str, sample: CheckContext, attention: dict[str, str]) -> Cell:
    packed = sample.packing
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    try:
        model = sample.task.load_model(
            path, pad_id=sample.pad_id, trust_remote_code=False, dtype=torch.float32, **attention
        ).eval()
    except JobError as error:
        return Cell(family, task, packed, refused=str(error))
    context = replace(sample, model=model)
    error = first_loss_error(context, path)
    asked = {name: CHECKS[name] for name in ASKED}
    if packed and task == "pretrain":
        asked[BF16] = bf16_follows
    failed = [f"{name}: {detail}" for name, check in asked.items() for passed, detail in [check(context)] if not passed]
    beyond = longest_read(context) > max(getattr(model.config.get_text_config(), name, 0) or 0 for name in WINDOWS)
    return Cell(family, task, packed, error, tuple(failed), beyond=beyond)


def compared_rows(context: CheckContext) -> list[list[Example]]:
    """The packs whose losses are compared."""
    return gradients.rows_of(context, range(min(len(context.packs), 3)))


def longest_read(context: CheckContext) -> int:
    """Most tokens that the model reads as one text, of those rows; of a pair's sentences each by itself."""
    rows = [row for pack in compared_rows(context) for row in pack]
    if getattr(context.task, "embeds", False):
        return max(max(row.extra["pair_start"], len(row.input_ids) - row.extra["pair_start"]) for row in rows)
    return max(len(row.input_ids) + len(row.extra.get("target", ())) * row.extra.get("causal", False) for row in rows)


def embedding_loss(context: CheckContext, rows: list[Example]) -> float:
    """The loss of `cosine`, from what the body says to each sentence alone."""
    low, high = context.task.options.score_range
    loss = 0.0
    for row in rows:
        cut, ids = row.extra["pair_start"], torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            one, two = (context.model(half[None]).last_hidden_state[0].mean(0) for half in (ids[:cut], ids[cut:]))
        alike = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        loss += (alike - (row.extra["score"] - low) / (high - low)) ** 2
    return loss


def first_loss_error(context: CheckContext, path: str) -> float:
    """The loss of some packs as training computes it, against the model class's own, one row to a line."""
    task, encoder = context.task, load_encoder(path)
    packs = compared_rows(context)
    rows = [row for pack in packs for row in pack]
    batch = gradients.collate(context, packs)
    ours = float(task.step_loss(context.model, *batch.to("cpu")).detach())
    plain = {
        name: torch.from_numpy(array) for name, array in as_transformers(task, rows, encoder, gradients.DRAW).items()
    }
    if token_types(context.model.config) < 2:
        plain.pop("token_type_ids", None)
    if getattr(task, "embeds", False):
        inputs, labels = batch.to("cpu")
        ours = float(task.loss_sum(task.forward(context.model, inputs), labels).detach())  # without a router's
        return gradients.relative_difference(ours, embedding_loss(context, rows))
    with torch.no_grad():
        loss = span_loss(context.model, **plain) if "start_positions" in plain else context.model(**plain).loss
    theirs = float(loss) * gradients.count_targets(batch)
    return gradients.relative_difference(ours, theirs)
