"""The adapters of a checkpoint alone, as a folder that PEFT loads over the pretrained model.

Two numbers make a rank: `adapter_config.json` names the layers in full, `adapter_model.safetensors` has their factors
and a new head's weights, in fp32 as the optimizer holds them. peft itself says which names it will look for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.architecture import Weight
from trainers.checkpoint.adapters import trained_weight
from trainers.checkpoint.export import Provenance, on_meta, open_checkpoint, write_provenance, write_settings
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.lora import add_adapters, new_head
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tensor_file import write_parts
from trainers.tokenizer.encoder import load_encoder

WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""peft's names."""


def export_adapter(checkpoint: Folder, out: Folder, job: Job, task: Task, model_path: str) -> Provenance:
    """Write the adapters of one checkpoint.

    Args:
        task: knowing its labels.
        model_path: the pretrained folder.

    Raises:
        EvaluationError: where the checkpoint is damaged or peft would not load the result as the same adapters.
        OSError: where it cannot be read now.
    """
    import torch

    assert job.model.lora is not None
    trust = job.model.trust_remote_code
    reader, encoder = open_checkpoint(checkpoint), load_encoder(model_path, trust)
    config = task.load_config(model_path, encoder.pad_id, trust)
    empty = on_meta(config, task, trust)
    head = [name for name in new_head(empty, task) if any(True for _ in empty.get_submodule(name).parameters())]
    adapted = add_adapters(empty, job.model.lora, task)
    settings = adapted.peft_config[adapted.active_adapter]
    settings.modules_to_save = head or None
    settings.base_model_name_or_path, settings.revision = job.model.path, job.model.revision
    settings.task_type = TASK_TYPES.get(task.head_class(config))
    weights: dict[str, Weight] = {}
    for name in reader.state.shapes:
        if reader.holds("weight", name):
            stored = name.replace(".default.", ".")
            weights[stored] = trained_weight(reader, name, stored, torch.float32)
    _check_names(settings, on_meta(config, task, trust), weights)
    write_settings(task.serving(encoder), config, Path(model_path), out, False)
    out.write_bytes("adapter_config.json", _settings_json(settings))
    if head:
        out.write_json("config.json", config.to_dict())

    def parts(name: str) -> Iterator[Any]:
        return weights[name].parts()

    with out.open_output(WEIGHTS) as stream:
        digest = write_parts(stream, [weight.spec for weight in weights.values()], parts, {"format": "pt"})
    return write_provenance(checkpoint, reader, out, "float32", {WEIGHTS: digest})


def _settings_json(settings: Any) -> bytes:
    """What peft's own save_pretrained writes."""
    import tempfile

    settings.inference_mode = True
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        settings.save_pretrained(scratch)
        return (Path(scratch) / "adapter_config.json").read_bytes()


def _check_names(settings: Any, empty: Any, weights: dict[str, Weight]) -> None:
    """See that peft, with nothing of ours about it, looks for just these. Raises EvaluationError."""
    from copy import deepcopy

    from peft import get_peft_model, get_peft_model_state_dict

    wanted = get_peft_model_state_dict(get_peft_model(empty, deepcopy(settings)))
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    differing = shapes.items() ^ {name: weight.spec.shape for name, weight in weights.items()}.items()
    if differing:
        raise EvaluationError(
            f"peft would not find these adapters again: {sorted(differing)[:4]}; export without --adapter"
        )
