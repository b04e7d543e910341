"""Sections of a job file that stand inside other sections, what tasks read of it, and what every section is."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from trainers.credentials import hide_address
from trainers.job.task_fields import TOKEN_TASKS, AnyPath, For, ModelPath, path_if

Strings = Annotated[tuple[str, ...], Field(strict=False)]
LISTED = BeforeValidator(lambda value: [value] if isinstance(value, str | dict) else value)
"""One entry may stand for a list of one."""


class Section(BaseModel):
    """Base of every section: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put a section's own fields before those it inherits, as users read them."""
        own = [name for name in cls.__annotations__ if name in cls.model_fields]
        if len(own) < len(cls.model_fields):
            cls.__pydantic_fields__ = {name: cls.model_fields[name] for name in (*own, *cls.model_fields)}
            cls.model_rebuild(force=True)


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning; export merges them into the weights."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Inner dimension of the two factors."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Their product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    target_modules: Strings = ("all-linear",)
    """Names of the linear layers that get adapters; all-linear means every one but the head."""


class MaskSection(Section):
    """mlm: what is hidden."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are predicted; of these 80 % become the mask token, 10 % a random one, 10 % stay."""
    whole_words: bool = False
    """Hide all tokens of a word together."""


class DistillSection(Section):
    """Learning from a teacher beside the labels."""

    teacher: ModelPath
    """Folder or hub id of a model with the same head and vocabulary; every rank holds it whole."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Both distributions are softened by it; the divergence is scaled by its square."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the divergence; the cross entropy has the rest."""


class ContinueSection(Section):
    """Where a run begins that goes on with another's training: weights, moments, step and place in the data."""

    run: AnyPath
    """The other run's folder."""
    step: Annotated[int, Field(ge=1)]
    """A step that it committed."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    """The content of that checkpoint's COMMITTED, where no other may be taken; null takes what is there."""


class GenerateSection(Section):
    """How texts are generated in evaluation, as transformers' `generate` names it."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    num_beams: Annotated[int, Field(ge=1)] = 1
    do_sample: bool = False
    """Sample instead of taking the likeliest; draws depend on the seed and the row alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 is no bound."""
    length_penalty: float = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0


class DataOptions(Section):
    """What tasks read of the section `data`."""

    multi_label: Annotated[bool, For("classify", shapes_shards=True)] = False
    """classify: `label` is a list, and any number of labels may be right."""
    window_overlap: Annotated[int, Field(ge=0), For("extract", shapes_shards=True)] = 128
    """extract: tokens that two windows of a long context share."""
    score_range: Annotated[tuple[float, float], Field(strict=False), For("similarity", shapes_shards=True)] = (0.0, 1.0)
    """similarity: lowest and highest score; rows outside are dropped, the embedding modes scale to 0 ... 1."""
    prompt: Annotated[str | None, For("seq2seq", shapes_shards=True)] = None
    """seq2seq: how a source is put to the model, with {source}, e.g. "translate English to German: {source}"; of rows
    in several languages also with their fields {source_language} and {target_language}."""
    max_target_length: Annotated[int, Field(ge=2), For("seq2seq", shapes_shards=True)] = 128
    """seq2seq: longest target in tokens; max_length bounds the source, or for causal models both together."""
    chat_template: Annotated[
        str | None, path_if(lambda value, base: value.endswith(".jinja")), For("sft", shapes_shards=True)
    ] = None
    """sft: a Jinja template, or the path of one, in place of the tokenizer's."""
    each_turn: Annotated[bool, For("sft", shapes_shards=True)] = False
    """sft: train each turn of the assistant in a rendering that ends with it. Templates that hide the thoughts of
    earlier turns so train them too; a row becomes as many sequences as are needed."""


class TrainOptions(Section):
    """What tasks read of the section `train`."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Orders the data, initializes new layers and drives dropout."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1), For(*TOKEN_TASKS, "extract")] = 0.0
    """Share of the target distribution that is spread over all classes."""
    class_weights: Annotated[dict[str, float] | Literal["balanced"] | None, For("classify")] = None
    """classify: factor of each label's loss; balanced means rows / (labels x rows of the label)."""
    mask: Annotated[MaskSection, For("mlm")] = MaskSection()
    """mlm: what is hidden."""
    objective: Annotated[Literal["regression", "cosine", "contrastive"], For("similarity", shapes_shards=True)] = (
        "regression"
    )
    """similarity: regression trains a head over the pair. cosine fits the cosine of two sentence embeddings to the
    score; contrastive draws them together, or pushes them apart by a margin."""


class OwnMetric(Section):
    """A metric that the user wrote, in Python."""

    function: Annotated[str, path_if(lambda value, base: value.rpartition(":")[0].endswith(".py"))]
    """FILE.py:NAME or MODULE:NAME, called as NAME(labels, predictions, texts), lists with an entry a row; gives a
    number. Naming it here allows it to run."""
    better: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""


class EvaluateOptions(Section):
    """What tasks read of the section `evaluate`."""

    metrics: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], OwnMetric] = {}
    """Metrics of your own, by name, beside the task's."""
    generate: Annotated[GenerateSection | None, For("sft", "seq2seq")] = None
    """seq2seq (always, null means greedy) and sft (when given): generate texts and compare them."""
    no_answer_threshold: Annotated[float, For("extract")] = 0.0
    """extract: how far the no-answer score must exceed the best span's for the answer to be none."""
    bleu_tokenize: Annotated[Literal["13a", "intl", "zh", "char", "none"], For("seq2seq")] = "13a"
    """seq2seq: sacreBLEU's tokenizer."""


class EarlyStopping(Section):
    """When to stop before the last step."""

    patience: Annotated[int, Field(ge=1)]
    """Evaluations without a new best before training stops."""


class EvaluateSection(EvaluateOptions):
    """How checkpoints are scored."""

    metric: str | None = None
    """The metric that chooses the best checkpoint; null means the task's own."""
    mode: Literal["max", "min"] | None = None
    """Whether larger or smaller is better; null means what the metric implies."""
    guards: dict[str, float] = {}
    """METRIC or METRIC@NAME: a checkpoint whose value is worse than this is never chosen."""
    while_training: bool = True
    """Evaluate checkpoints as they come; otherwise after the training."""
    on: Literal["auto", "free", "ranks"] = "auto"
    """While training: free takes devices beside the ranks; ranks has the ranks evaluate, who stand still meanwhile.
    auto takes the ranks where no device is free, the model fits none, or no controller is there."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences a forward pass."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that share an evaluation, each with the whole model and a part of the rows; metrics stay the same."""
    early_stopping: EarlyStopping | None = None
    lm_eval: Annotated[
        tuple[Annotated[str, path_if(lambda value, base: value.endswith(".yaml"))], ...],
        Field(strict=False),
        LISTED,
    ] = ()
    """Tasks of lm-eval, by name or as a YAML file. The best checkpoint of a causal model answers them before it is
    registered; their metrics are METRIC@TASK."""


MOST_NAME = 256


def _registry_name(name: str | None) -> str | None:
    if name is not None and (name.strip() in ("", ".", "..") or {"/", ":"} & set(name)):
        raise PydanticCustomError("registry_name", "must be a name without / and :, which registries refuse")
    if name is not None and (len(name) > MOST_NAME or "'" in name or not name.isprintable()):
        kinds = f"must be a name of at most {MOST_NAME} characters, without ' and line breaks, which registries refuse"
        raise PydanticCustomError("registry_name", "{kinds}", {"kinds": kinds})
    return name


SECRET = "secret"
"""Type of an error whose value is not to be shown."""


def hide_hook(value: Any) -> Any:
    """An address of a web hook without its path."""
    try:
        return hide_address(value)
    except ValueError as error:
        raise PydanticCustomError(SECRET, "{rule}", {"rule": str(error)}) from None


class RegistrySection(Section):
    """Where the best model is registered."""

    model: Annotated[str | None, AfterValidator(_registry_name)] = None
    """Name in the registry, without / and :; null means the job's name."""
    uri: str | None = None
    """An MLflow tracking server; null means SQLite under storage."""
    promote: Literal["if_better", "always", "never"] = "if_better"
    """When the new version takes the alias champion."""


class CheckpointSection(Section):
    """When the state is saved, and how much of it stays."""

    every_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that stay, beside the best one and those being evaluated."""
    grace_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between SIGTERM or a preemption notice and the end of the machine; a rank that has not committed by then
    ends without."""
    storage: AnyPath | None = None
    """Where checkpoints go instead of the run folder, such as s3://bucket/key; shared by all nodes too."""
    start_over: bool = False
    """Begin at step 0 where every checkpoint was found damaged, or all are gone; otherwise such a run ends."""


class Elastic(Section):
    """A range of world sizes."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


class ScaleSection(Section):
    """How many workers, and what each takes."""

    workers: Annotated[int, Field(ge=1)] | Elastic = 1
    """Ranks of the training; a range lets the run go on with fewer and grow back."""
    gpus_per_worker: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: one where the cluster has GPUs, else none."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Also the number of threads of each rank on CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row, without a new checkpoint between them, before the job fails."""
    hang_after_s: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Seconds without progress after which the ranks are restarted, with a report of who hung where; auto: 20 times the
    median step, at least 60, and 1,800 while loading."""

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min
