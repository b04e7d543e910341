"""The forms that a model can be quantized to: what each can take, how it is written, how it is asked again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trainers.checkpoint.export import COPIED, on_meta
from trainers.errors import EvaluationError, JobError
from trainers.evaluation.evaluate import evaluate_model
from trainers.job.schema import Job
from trainers.quantization.gguf_file import check_gguf, write_gguf
from trainers.quantization.with_torchao import check_torchao, write_quantized
from trainers.records import Array
from trainers.shards.dataset import ShardSet
from trainers.tasks import Task
from trainers.tokenizer.gguf_vocabulary import check_vocabulary

Form = Literal["q8_0", "int8", "fp8"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Quantization:
    """One exported model and the form that it is to have.

    Args:
        source: a folder that an export wrote.
        task: knowing its labels.
    """

    form: str
    source: Path
    job: Job
    task: Task

    @property
    def gguf_name(self) -> str:
        """The file of form q8_0."""
        return f"{self.job.name}-q8_0.gguf"

    def write(self, out: Path, rows: list[list[int]]) -> list[str]:
        """Write the artefact into a folder. Returns what should be known of it.

        Args:
            rows: token ids of texts that the tokenizer is tried on.

        Raises:
            EvaluationError: where it cannot be written as the model is.
        """
        config = model_config(self.job, self.task, self.source)
        if self.form != "q8_0":
            for file in (file for pattern in COPIED for file in self.source.glob(pattern)):
                (out / file.name).write_bytes(file.read_bytes())
            write_quantized(self.source, out, on_meta(config, self.task, False), self.form)
            return []
        # no tokenizer files beside it: transformers would take them for those of the GGUF file, and lose the template
        write_gguf(self.source, out / self.gguf_name, config, self.job.name)
        note = check_vocabulary(self.source, out / self.gguf_name, rows)
        return ["transformers unpacks the blocks and computes in the model's type", *([note] if note else [])]

    def score(self, out: Path, shards: ShardSet) -> tuple[Array, dict[str, Array]]:
        """What the artefact says to every row, loaded as transformers loads it; as `evaluate_model` gives it.

        Raises:
            EvaluationError: where this machine cannot run it.
        """
        from transformers import GgufConfig

        options: dict[str, Any] = {}
        path = out
        if self.form == "q8_0":  # the configuration of the export; what is in the file leaves out some ropes
            path = self.source
            options = {
                "gguf_file": str(out / self.gguf_name),
                "quantization_config": GgufConfig(dequantize=True),
                "use_safetensors": None,
            }
        try:
            return evaluate_model(self.job, self.task, str(path), shards, **options)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            raise EvaluationError(f"{self.form} cannot be run here, so it was not judged: {error}") from error


def check_form(form: str, job: Job, task: Task, model_path: str) -> None:
    """See that a model can have a form, before anything is written.

    Args:
        model_path: the pretrained folder, or an export.

    Raises:
        JobError: where it cannot; with what can.
    """
    if form not in FORMS:
        raise JobError(f"--quantize {form}: there are {', '.join(FORMS)}")
    config = model_config(job, task, Path(model_path))
    if form == "q8_0":
        check_gguf(config, task.head_class(config), Path(model_path))
    else:
        check_torchao(on_meta(config, task, job.model.trust_remote_code), form, job.model.trust_remote_code)


def model_config(job: Job, task: Task, path: Path) -> Any:
    """The configuration of a model folder with the task's head."""
    from trainers.tokenizer.encoder import load_encoder

    trust = job.model.trust_remote_code
    return task.load_config(str(path), load_encoder(str(path), trust).pad_id, trust)
