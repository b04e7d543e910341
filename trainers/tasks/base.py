"""What every task provides, and the records that pass between a task and the shared stages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.architecture import cut_layers, make_ready, may_cache, plain_model, set_dropout, set_pad, token_types
from trainers.errors import JobError
from trainers.job.schema import Job, Overlong
from trainers.pretrained import class_for, load_pretrained
from trainers.records import Array
from trainers.tasks.batch import Batch as Batch
from trainers.tasks.batch import Example as Example
from trainers.tasks.losses import IGNORE as IGNORE
from trainers.tasks.losses import TokenScores as TokenScores
from trainers.tasks.losses import cross_entropy_sum
from trainers.tasks.losses.router import with_router_loss
from trainers.tasks.metrics.own import own_value
from trainers.tasks.options import DEFAULTS, TaskOptions, task_options
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import EncodedBatch

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
class Serving:
    """What a trained model needs beside its weights, to be used as it was trained; the export writes it down."""

    chat_template: str | None = None
    """In place of the tokenizer's own."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which generation ends, beside those the pretrained model knows."""
    first_tokens: tuple[tuple[str, int], ...] = ()
    """Settings of generation, with their names, that begin a text in the language of the targets."""


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

    def spans(self, lengths: Array, targets: Array) -> Array:
        """Positions that each sequence takes of a micro-batch, int64 [rows] as are `lengths` and `targets`."""
        return lengths.astype(np.int64)

    @abstractmethod
    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Sequences (each of one or more documents) as arrays [batch, seq].

        Args:
            draw: what random draws seed with beside seed and row: the step, from 1; 0 in evaluation, always the same.
        """

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        """For people: the ids of a sequence as the model gets them, and which of them are targets, bool [length]."""
        return row.input_ids, np.zeros(len(row.input_ids), dtype=bool)

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
        return self.read(self.outputs(model, inputs), inputs)

    def answers(
        self, model: Any, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor | TokenScores:
        """For evaluation, what `score` is given: `forward`, or scores of the targets in the place of large logits."""
        scores = None
        if self.over_vocabulary:
            from trainers.tasks.losses.chunked import scores_in_place

            scores = scores_in_place(model, lambda: self.forward(model, inputs), labels)
        return self.forward(model, inputs) if scores is None else scores

    def outputs(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the model class returns. Token types go to models alone that have embeddings for them."""
        given = dict(inputs)
        if token_types(plain_model(model).config) < 2:
            given.pop("token_type_ids", None)
        caches = {"use_cache": False} if may_cache(model) else {}
        return model(**given, **caches | dict(self.forward_options))

    def read(self, outputs: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the loss is computed from, out of what the model class returned."""
        logits: torch.Tensor = outputs.logits
        return logits

    def step_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training loss of a micro-batch, summed over targets, whose places `Batch.targets` tells."""

        def own_loss(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
            loss = None
            if self.over_vocabulary:
                from trainers.tasks.losses.chunked import loss_in_place

                loss = loss_in_place(model, forward, labels, self.options.label_smoothing, targets)
            return self.loss_sum(forward(), labels, targets) if loss is None else loss

        return with_router_loss(self, own_loss, model, inputs, labels)

    def real_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[batch, seq], 0 where there is padding."""
        return inputs["attention_mask"]

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Loss summed over targets, fp32 scalar; logits [..., classes] of labels [...]. None looks for the targets."""
        return cross_entropy_sum(logits, labels, self.options.label_smoothing, targets=targets)

    @abstractmethod
    def score(self, logits: Any, batch: Batch) -> dict[str, Array]:
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

    def draw_metrics(
        self, row_scores: Mapping[str, Array], draws: Iterable[Array], metric: str | None = None
    ) -> Iterator[dict[str, float]]:
        """`metrics` of each draw of documents, int [documents drawn], for callers that draw hundreds.

        Args:
            metric: where one alone is asked for, so that others may be left out.
        """
        numbers = {name: values for name, values in row_scores.items() if values.dtype != object}  # no texts
        for rows in draws:
            yield self.metrics({name: values[rows] for name, values in numbers.items()})

    def measure(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """`metrics`, and those that the job brings."""
        return self.metrics(row_scores) | {name: self.metric_value(name, row_scores) for name in self.options.metrics}

    def metric_value(self, name: str, row_scores: Mapping[str, Array]) -> float:
        """One of `measure` alone, for callers that need it a thousand times; nan where rows leave it undefined."""
        if name in self.options.metrics:
            return own_value(name, self.options, self.labels, row_scores)
        return self.metrics(row_scores).get(name, math.nan)

    def guesses(self, row_scores: Mapping[str, Array], seed: int) -> dict[str, dict[str, Array]]:
        """Row scores of answers that need no reading, by what they are."""
        return {}

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
        from transformers import AutoConfig

        changes = self.config_changes()
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **changes)
        if self.options.dropout is not None:
            set_dropout(config, self.options.dropout, class_for(self.head_class(config), config))
        set_pad(config, pad_id)
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
        if type(config) not in auto._model_mapping and not trust_remote_code:
            raise JobError(
                f"model.path: transformers has no {self.head_class(config).removeprefix('AutoModelFor')} head for a "
                f"{config.model_type} model; choose another model or task"
            )
        options |= {"config": config, "trust_remote_code": trust_remote_code}
        model: torch.nn.Module = load_pretrained(auto, path, **options)[0]
        make_ready(model, self.head_class(config))
        return model

    def model_class(self, path: str, pad_id: int, trust_remote_code: bool) -> type:
        """transformers' class that `load_model` gives an instance of; object where it is the model's own code."""
        config = self.load_config(path, pad_id, trust_remote_code)
        return class_for(self.head_class(config), config)

    def head_class(self, config: Any) -> str:
        return self.auto_class

    @property
    def metrics_named(self) -> tuple[str, ...]:
        """Metrics that a job may choose by."""
        return (*self.metrics_known, *self.options.metrics)

    def left_out(self, metric: str) -> str | None:
        """Why these options leave out one of `metrics_known`, with the remedy; None where they do not."""
        return None

    def better_mode(self, metric: str) -> str:
        own = self.options.metrics.get(metric)
        return own.better if own else "min" if metric in self.smaller_is_better else "max"
