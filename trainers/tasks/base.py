"""What every task provides, and the records that pass between a task and the shared stages."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.errors import JobError
from trainers.job.schema import Job, Overlong
from trainers.records import Array
from trainers.tasks.losses import IGNORE as IGNORE
from trainers.tasks.losses import cross_entropy_sum
from trainers.tasks.options import DEFAULTS, TaskOptions, task_options
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import EncodedBatch, insert_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EncodeRules:
    """What the job says of the form of sequences."""

    max_length: int
    overlong: Overlong
    options: TaskOptions = DEFAULTS


def encode_rules(job: Job) -> EncodeRules:
    return EncodeRules(job.data.max_length, job.overlong, task_options(job))


@dataclass(frozen=True)
class Example:
    """One sequence as read back from a shard."""

    index: int
    """Its place in the whole split."""
    input_ids: Array
    """int32 [length]."""
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Serving:
    """What a trained model needs beside its weights, to be used as it was trained; the export writes it down."""

    chat_template: str | None = None
    """In place of the tokenizer's own."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which generation ends, beside those the pretrained model knows."""


class Task(ABC):
    """A supervised task. Instances hold no state but `labels` and `options`."""

    extra_schema: tuple[tuple[str, pa.DataType], ...] = ()
    """Columns a shard holds beside input_ids and the row's origin."""
    metric: str
    """The metric that chooses the best checkpoint unless the job names another."""
    smaller_is_better: frozenset[str] = frozenset({"loss", "perplexity"})
    metrics_known: tuple[str, ...]
    """Names that `metrics` returns."""
    auto_class: str
    """transformers' class that puts this task's head on a model."""
    forward_options: Mapping[str, Any] = MappingProxyType({})
    """Arguments of every forward pass beside the batch."""
    has_labels: bool = False
    """Whether rows show labels of a closed set, as `labels_of` tells."""
    over_vocabulary: bool = False
    """Whether the loss is a cross entropy over the vocabulary, one target a position."""
    new_head: bool = False
    """Whether the pretrained model lacks the head, so that it says nothing before training."""

    def __init__(self, options: TaskOptions = DEFAULTS) -> None:
        self.options = options
        self.labels: tuple[str, ...] = ()

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        """Why a row, given as the task's fields, cannot be used; None where `encode` may have it."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize rows that `refusal` let pass, in order. Call it through `encode_rows`."""

    def count_targets(self, table: pa.Table) -> Array:
        """Targets of each sequence of a shard, int64 [rows]: what the loss is averaged over."""
        return np.ones(table.num_rows, dtype=np.int64)

    @abstractmethod
    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Sequences (each of one or more documents) as arrays [batch, seq].

        Args:
            draw: what tasks that draw at random seed with, beside the job's seed and the row: the step's number,
                counted from 1; 0 in evaluation, which therefore draws the same each time.
        """

    def labels_of(self, extra: Mapping[str, Any]) -> Iterable[str]:
        """The labels that a sequence shows; the training rows' make up `labels`."""
        return (extra["label"],) if "label" in extra else ()

    def label_set(self, shown: Iterable[str]) -> tuple[str, ...]:
        """The labels of the logits, from those that training rows show."""
        return tuple(shown)

    def knows(self, label: str, shown: Iterable[str]) -> bool:
        """Whether an evaluation row may have this label, where training rows show those."""
        return label in shown

    def count_labels(self, batch: pa.RecordBatch) -> dict[str, int]:
        """Sequences of a record batch by the label they show; one with several labels counts for each."""
        extras = batch.select([name for name, _ in self.extra_schema]).to_pylist()
        return dict(Counter(label for extra in extras for label in self.labels_of(extra)))

    def prepare(self, encoder: Encoder) -> None:  # noqa: B027 - most tasks need nothing
        """Get ready for `collate` and evaluation with what only the tokenizer knows; called once before either."""

    def forward(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run a model, or an engine around one, and give what the loss is computed from."""
        logits: torch.Tensor = model(**inputs, **self.forward_options).logits
        return logits

    def step_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The training loss of a micro-batch, summed over targets."""
        if self.over_vocabulary:
            from trainers.tasks.losses.chunked import head_loss, head_of

            head = head_of(model)
            if head is not None:
                loss = head_loss(lambda: self.forward(model, inputs), head, labels, self.options.label_smoothing)
                if loss is not None:
                    return loss
        return self.loss_sum(self.forward(model, inputs), labels)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss summed over targets, fp32 scalar; logits [..., classes] of labels [...]."""
        return cross_entropy_sum(logits, labels, self.options.label_smoothing)

    @abstractmethod
    def score(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """For evaluation: per document the numbers its metrics are made of, each [documents of the batch]."""

    def generate(self, model: Any, rows: Sequence[Example], pad_id: int) -> dict[str, Array]:
        """For evaluation, where the job asks for texts: numbers about them, each [rows], beside those of `score`."""
        return {}

    def merge(self, rows: Array, row_scores: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Put together what `score` said of several sequences of one input row; rows ascend, each once."""
        return rows, row_scores

    @abstractmethod
    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """Metrics over the documents that `score` saw, in any order."""

    def metric_value(self, name: str, row_scores: Mapping[str, Array]) -> float:
        """One of `metrics` alone, for callers that need it a thousand times."""
        return self.metrics(row_scores)[name]

    def notes(self) -> dict[str, str]:
        """What makes the metrics comparable, by metric, where a name and a number do not say it all."""
        return {}

    def serving(self, encoder: Encoder) -> Serving:
        return Serving()

    def config_changes(self) -> dict[str, Any]:
        """What this task changes in the model's configuration: labels, so that the exported model names its answers."""
        if not self.has_labels:
            return {}
        id2label = dict(enumerate(self.labels))
        label2id = {name: index for index, name in id2label.items()}
        return {"num_labels": len(id2label), "id2label": id2label, "label2id": label2id}

    def load_config(self, path: str, pad_id: int, trust_remote_code: bool) -> Any:
        """The model's configuration with this task's changes."""
        from transformers import AutoConfig

        changes = self.config_changes()
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **changes)
        if self.options.dropout is not None:
            set_dropout(config, self.options.dropout)
        if config.pad_token_id is None:  # causal models with a classification head find a row's last token by it
            config.pad_token_id = pad_id
        return config

    def load_model(
        self, path: str, pad_id: int, trust_remote_code: bool, layers: int | None = None, **options: Any
    ) -> torch.nn.Module:
        """The pretrained model with this task's head, by transformers' from_pretrained.

        Args:
            layers: only so many of its first layers.
        """
        import transformers

        transformers.logging.set_verbosity_error()  # it reports a new head as missing weights
        config = self.load_config(path, pad_id, trust_remote_code)
        if layers is not None:
            cut_layers(config, layers)
        auto: Any = getattr(transformers, self.head_class(config))
        model: torch.nn.Module = auto.from_pretrained(
            path, config=config, trust_remote_code=trust_remote_code, **options
        )
        return model

    def head_class(self, config: Any) -> str:
        return self.auto_class

    def better_mode(self, metric: str) -> str:
        return "min" if metric in self.smaller_is_better else "max"


def encode_rows(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    encoder: Encoder,
    rules: EncodeRules,
    settled: Sequence[str | None] | None = None,
) -> EncodedBatch:
    """Encode rows, one outcome each; those that the task refuses are dropped with its reason.

    Args:
        settled: [rows], the outcome of each row that must not reach the task, None for the others.
    """
    outcomes = list(settled or [None] * len(rows))
    for index, row in enumerate(rows):
        if outcomes[index] is None and (reason := task.refusal(row, rules.options)):
            outcomes[index] = f"dropped:{reason}"
    usable = np.array([index for index, outcome in enumerate(outcomes) if outcome is None], dtype=np.int64)
    if len(usable) == len(rows):
        return task.encode(rows, encoder, rules)
    return insert_rows(task.encode([rows[index] for index in usable], encoder, rules), usable, outcomes)


DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def cut_layers(config: Any, layers: int) -> None:
    for name in DEPTHS:
        if isinstance(depth := getattr(config, name, None), int):
            setattr(config, name, min(depth, layers))
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:layers]


DROPOUT_RATE = re.compile(r"(dropout(_rate|_prob)?|_pdrop)$")


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate of a configuration. Raises JobError where it has none."""
    names = [
        name
        for name, value in config.to_dict().items()
        if DROPOUT_RATE.search(name) and (isinstance(value, float | int) or value is None)
    ]
    if not names:
        raise JobError(f"model.dropout: a {config.model_type} configuration has no dropout rate; leave it out")
    for name in names:
        setattr(config, name, rate)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, as numpy arrays."""

    inputs: dict[str, Array]
    """Arguments of the model's forward."""
    labels: Array
    """What the loss compares with; IGNORE where there is no target."""
    rows: Array
    """int64 [documents]: places in the split of the documents in this batch."""
    documents: tuple[Example, ...] = ()
    """The rows themselves, in the order of `rows`, for tasks whose metrics need more than labels."""
    segments: Array | None = None
    """int64 [batch, seq], for packed batches: the document of a position, as an index into `rows`; -1 is padding."""

    def to(self, device: torch.device | str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs and labels as tensors on a device."""
        import torch

        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in self.inputs.items()}
        return inputs, torch.from_numpy(np.ascontiguousarray(self.labels)).to(device)

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        if self.segments is not None:
            return int((self.segments >= 0).sum())
        return int(self.inputs["attention_mask"].sum())
