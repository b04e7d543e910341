"""The job file: what a user asks for, as frozen records. Begin at `Job`.

Owns the schema and its defaults; `load.py` reads and checks the file. Whether paths exist, columns match and batches
divide is checked by the stages that look. Without torch and transformers, so `tuneyard --help` stays quick.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainers.credentials import all_known, learn
from trainers.job.sections import (
    LISTED,
    CheckpointSection,
    ContinueSection,
    DataOptions,
    DistillSection,
    LoraSection,
    RegistrySection,
    ScaleSection,
    Section,
    Strings,
    TrainOptions,
    hide_hook,
)
from trainers.job.sections import (
    EarlyStopping as EarlyStopping,
)
from trainers.job.sections import (
    EvaluateSection as EvaluateSection,
)
from trainers.job.task_fields import PACKING_TASKS, SPLITTING_TASKS, TOKEN_TASKS, AnyPath, For, ModelPath, path_if

TaskName = Literal["pretrain", "mlm", "sft", "classify", "tag", "extract", "seq2seq", "similarity"]
Overlong = Literal["truncate", "split", "drop", "error"]
FormatName = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "conll", "parallel"]
PAIR = " | "
"""Stands between the two files of a parallel text where both are named in one word."""

CHAT_FIELDS = ("prompt", "completion", "conversations", "instruction", "input", "output", "system", "history", "tools",
               "functions", "reasoning_content", "reasoning", "thinking")  # fmt: skip
TASK_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pretrain": (("text",), ()),
    "mlm": (("text",), ()),
    "sft": (
        ("messages",),
        # beside the conversation, what says that a row is something else
        (
            *CHAT_FIELDS,
            "chosen",
            "rejected",
            "images",
            "image",
            "videos",
            "video",
            "audios",
            "audio",
            "kto_tag",
            "label",
            "chat_template_kwargs",
        ),
    ),
    "classify": (("text", "label"), ("text_pair",)),
    "tag": (("tokens", "tags"), ()),
    "extract": (("question", "context", "answers"), ("id",)),
    "seq2seq": (("source", "target"), ("source_language", "target_language")),
    "similarity": (("sentence1", "sentence2", "score"), ()),
}
"""For each task its required and its optional fields; `data.columns` maps a field to the data's column."""


class ModelSection(Section):
    """Which pretrained model, and how it is held in memory."""

    path: ModelPath
    """Hub id, or a folder with config.json, safetensors and a tokenizer."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """File name inside `path`; the driver dequantizes it once into fp32 safetensors, tensor by tensor."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the working weights and activations; the optimizer always keeps fp32."""
    attention: str = "auto"
    """Backend as transformers names it; `documents`: each packed document by itself; auto: that where it works."""
    freeze: Strings = ()
    """Shell-style patterns over parameter names that stay as they are, e.g. "base_model.*"."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Replaces every dropout rate of the model's configuration; null leaves them."""
    lora: LoraSection | None = None
    """Train low-rank adapters only."""


class SourceSection(Section):
    """One part of a mixture, or two files whose lines belong together."""

    path: AnyPath | None = None
    """A path, glob, folder or data set, as `data.train` takes it."""
    source: AnyPath | None = None
    """seq2seq: instead of a path, a text file with a source a line,"""
    target: AnyPath | None = None
    """and one with the target of each, line by line."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each of its rows is shown an epoch: 2 shows all twice, 0.5 a half of them, drawn by the seed."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Instead of a weight: tokens an epoch, reached by leaving rows out or by showing them again."""


class DataSection(DataOptions):
    """Which rows, and how they become sequences."""

    train: Annotated[tuple[AnyPath | SourceSection, ...], Field(strict=False), LISTED]
    """Paths, globs or folders; local or s3://, gs://, hdfs://; hf:// data sets. Or {path, weight}, {path, tokens};
    for seq2seq also {source, target}: two text files, line by line."""
    eval: Annotated[tuple[AnyPath | SourceSection, ...], Field(strict=False), LISTED] = ()
    """The same for evaluation; or `eval_fraction`."""
    eval_sets: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")],
        Annotated[tuple[AnyPath, ...], Field(strict=False), LISTED],
    ] = {}
    """More evaluation sets by name, measured beside: their metrics are METRIC@NAME, and may be guards."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows held out for evaluation, chosen by a hash of each row's place."""
    format: FormatName | None = None
    """Read every file as this format; null tells it from the name."""
    columns: dict[str, str] = {}
    """The task's field: the data's column, where they differ."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest sequence, in tokens, special tokens included."""
    overlong: Overlong | None = None
    """What happens to longer ones; null means split for pretrain and truncate for the others."""
    packing: bool | None = None
    """Several documents a sequence, none seeing another; null means for pretrain and sft, where
    the model keeps them apart."""
    max_drop_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rows that may be dropped before the data is refused."""
    dedup: Literal["exact", "near"] | None = None
    """Leave out training rows that repeat an earlier one: in all but case and outer white space, or nearly."""
    decontaminate: Literal["report", "drop"] = "report"
    """Training rows that say what an evaluation row says: counted, or left out as well."""

    @property
    def train_paths(self) -> tuple[str, ...]:
        return tuple(map(_pattern, self.train))

    @property
    def eval_paths(self) -> tuple[str, ...]:
        return tuple(map(_pattern, self.eval))

    @property
    def is_mixture(self) -> bool:
        return any(not isinstance(one, str) and (one.weight or one.tokens) for one in self.train)


def _pattern(entry: str | SourceSection) -> str:
    return entry if isinstance(entry, str) else entry.path or f"{entry.source}{PAIR}{entry.target}"


class TrainSection(TrainOptions):
    """The optimization."""

    global_batch_size: Annotated[int, Field(ge=1)]
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Sequences a forward pass on one rank."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; or `steps`."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, down to zero at the last step."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; never on biases and norms."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 3.0
    """A loss over this many times the largest of the last 1,000 steps rolls back to the last checkpoint and skips that
    step; null rolls back only where loss or gradient are not finite."""
    deepspeed: Annotated[str, path_if(lambda value, base: value.endswith(".json"))] = "auto"
    """A name in ds_configs/ or the path of a JSON file; auto takes the cheapest that fits the GPUs, zero3 on CPUs."""
    activation_checkpointing: Literal["none", "full", "auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Layers that keep their inputs alone and are computed again in the backward pass: all (full), or every N-th. Less
    memory, up to a third more time, the same gradients. auto takes the cheapest that fits the GPUs, none on CPUs."""
    compile: bool = False
    """Compile the model's layers with torch.compile: faster steps on GPUs after a first one that takes up to a minute.
    Not under ZeRO-3, whose hooks stand between a layer's operators."""
    activation_offload: bool = False
    """Hold what checkpointed layers keep in host memory; needs activation_checkpointing. auto does so where it must."""
    offload_folder: AnyPath | None = None
    """For zero3-nvme-offload: a folder on each node's own disk, which holds weights and optimizer state meanwhile."""
    feed_forward_tiles: bool | Literal["auto"] = "auto"
    """Compute feed-forward layers a few thousand positions at a time, and again in the backward pass: less memory for
    long sequences, a sixth more time. auto does so where that is the cheapest way that fits the GPUs."""
    sequence_parallel: Annotated[int, Field(ge=1), For(*PACKING_TASKS)] = 1
    """Workers that share each sequence, a part of its positions on each: for sequences too long for one device. Divides
    scale.workers and the model's attention heads; the result does not depend on it."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this factor of the rate of the layer above it."""
    neftune_alpha: Annotated[float, Field(ge=0), For("pretrain", "sft", "seq2seq")] = 0.0
    """Uniform noise on the embeddings of causal models while training (NEFTune); 0 is none."""
    distill: Annotated[DistillSection | None, For(*TOKEN_TASKS)] = None
    """Learn from a teacher too."""
    continue_from: ContinueSection | None = None
    """Begin from a checkpoint of another run, with other values from that step on."""
    profile: bool = False
    """Look at three steps with torch's profiler: what takes the time, and a trace in the run folder's profile/."""
    deterministic: bool = False
    """The same bits in every run on the same cards, at some speed; on CPUs that is so anyway."""
    verify: bool = True
    """Run the self-tests of `tuneyard verify` before the first launch of a model, task and attention backend."""

    @property
    def checkpoint_every_layers(self) -> int:
        """Of so many layers one is checkpointed; 0: none."""
        if isinstance(self.activation_checkpointing, int):
            return self.activation_checkpointing
        return int(self.activation_checkpointing == "full")


LATER = (("data", "eval_sets"), ("evaluate", "guards"), ("evaluate", "metrics"), ("train", "continue_from"))
"""Fields that count in a job's identity where they are set: without them it is what it was before there were any."""


class Job(Section):
    """A whole job; paths are absolute once it is loaded."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    task: TaskName
    model: ModelSection
    data: DataSection
    train: TrainSection
    scale: ScaleSection = ScaleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    registry: RegistrySection = RegistrySection()
    report_to: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Field(strict=False), LISTED] = (
        "tensorboard",
        "mlflow",
    )
    """Who follows the run while it goes on; a registered version always has its MLflow run."""
    notify: Annotated[str | None, BeforeValidator(hide_hook)] = None
    """An http address that gets a message when the run is done, failed or preempted; its path counts as a secret."""
    storage: Annotated[AnyPath, Field(validate_default=True)] = "runs"
    """Folder or bucket shared by all nodes."""

    def __getstate__(self) -> dict[Any, Any]:
        return {"fields": super().__getstate__(), "credentials": all_known()}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        learn(state["credentials"])
        super().__setstate__(state["fields"])

    @property
    def packing(self) -> bool:
        return self.task in PACKING_TASKS if self.data.packing is None else self.data.packing

    @property
    def lengths_differ(self) -> bool:
        """Whether training sequences are of many lengths: neither packs nor blocks cut from longer texts."""
        return not self.packing and self.task != "pretrain"

    @property
    def overlong(self) -> Overlong:
        return self.data.overlong or ("split" if self.task in SPLITTING_TASKS else "truncate")

    def column(self, field: str) -> str:
        return self.data.columns.get(field, field)

    def counted(self) -> dict[str, Any]:
        """All that changes the trained weights or how they are scored, `evaluate.metric` included: another metric is
        another run. Where and how large the job runs does not count."""
        how = {
            "verify",
            "deterministic",
            "compile",
            "profile",
            "deepspeed",
            "micro_batch_size",
            "activation_checkpointing",
        }
        how |= {"activation_offload", "offload_folder", "sequence_parallel", "feed_forward_tiles"}
        parts = self.model_dump(mode="json", include={"task", "model", "data", "train"}, exclude={"train": how})
        parts["model"]["attention"] = parts["model"]["attention"].replace("documents", "auto")  # what auto comes to
        scored_by = {"metric", "mode", "generate", "no_answer_threshold", "bleu_tokenize", "guards", "metrics"}
        parts["evaluate"] = self.evaluate.model_dump(mode="json", include=scored_by)
        for section, name in LATER:
            if not parts[section][name]:
                del parts[section][name]
        return parts

    def identity(self) -> str:
        """Digest of all that counts."""
        return hashlib.sha256(json.dumps(self.counted(), sort_keys=True).encode()).hexdigest()
