"""Keys of a LLaMA-Factory configuration and what they are here; its data sets are looked up in dataset_info.json."""

import json
from typing import Any

from orchestrator.importing.defaults import LLAMAFACTORY, assume
from orchestrator.importing.draft import (
    ADAMW,
    LIGER,
    NO_OPTIMIZER,
    NO_SCHEDULE,
    NO_SHARE,
    SCHEDULES,
    SHARE,
    Draft,
    Rule,
    apply,
    batch,
    checkpointing,
    chosen,
    deepspeed,
    lora_section,
    number,
    warmup,
    when,
)
from trainers.tasks.chat.conversations import ROLES, SPEAKERS, TEXTS

TASKS = {"sft": "sft", "pt": "pretrain"}
FOLLOWED = ["tensorboard", "mlflow", "wandb"]
ATTENTION = {"auto": None, "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
COLUMNS = {"messages": "messages", "prompt": "instruction", "query": "input", "response": "output", "system": "system",
           "history": "history", "tools": "tools"}  # fmt: skip
"""Of dataset_info.json: our field of each of its columns."""
INFO = "dataset_info.json"
READ = frozenset(("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "subset", "split", "columns", "formatting"))
"""Its keys that are read here, or name the same data elsewhere."""


def import_llamafactory(draft: Draft) -> None:
    """Fill a draft from a LLaMA-Factory configuration."""
    source, job = draft.source, draft.job
    stage, kind = str(source.get("stage") or "sft"), source.get("finetuning_type") or "lora"
    apply(draft, RULES, REFUSED)
    assume(draft, {key: one for key, one in LLAMAFACTORY.items() if kind == "lora" or not key.startswith("lora_")})
    draft.set("task", TASKS.get(stage, "sft"))
    if stage not in TASKS:
        draft.tell("stage", f"{stage} is not here; task is sft")
    _data(draft)
    _form(draft, stage)
    size = int(source.get("per_device_train_batch_size") or 8)
    batch(draft, "per_device_train_batch_size", size, int(source.get("gradient_accumulation_steps") or 1))
    if kind == "lora":
        _lora(draft)
    elif kind != "full":
        draft.tell("finetuning_type", f"{kind} is not here: all weights are trained; model.freeze names what stays")
    warmup(draft, "lr_scheduler_type")
    if "steps" in job.get("train", {}):
        job["train"].pop("epochs", None)


def _form(draft: Draft, stage: str) -> None:
    """How rows become sequences."""
    packing = draft.source.get("packing")
    if packing is None and stage == "pt":  # as it has it for texts
        draft.set("data.packing", True)
        draft.assumed["data.packing"] = True
    if packing and stage == "sft" and not draft.source.get("neat_packing"):
        draft.tell("packing", "documents of a pack do not see each other, as there with neat_packing")
    if packing is False and stage == "pt":
        draft.set("data.overlong", "truncate")
    if stage == "sft":
        long = "of longer rows the end is cut off; there each turn's question and answer are shortened"
        draft.told["cutoff_len"] = long


def _lora(draft: Draft) -> None:
    """model.lora; its alpha is twice the rank where the file names none."""
    source, names = draft.source, {"rank": "lora_rank", "dropout": "lora_dropout", "target_modules": "lora_target"}
    rank = source.get("lora_rank") or 8
    given = {name: source.get(key) for name, key in names.items()} | {"alpha": source.get("lora_alpha") or 2 * rank}
    for name, value in lora_section(given).items():
        draft.set(f"model.lora.{name}", value)
    if not source.get("lora_alpha"):
        draft.assumed["model.lora.alpha"] = draft.get("model.lora.alpha")


def _names(value: Any) -> list[str]:
    words = value if isinstance(value, list) else str(value or "").split(",")
    return [str(word).strip() for word in words if str(word).strip()]


def _data(draft: Draft) -> None:
    """Both splits."""
    places, columns = _places(draft, "dataset")
    draft.set("data.train", places)
    held_out, more = _places(draft, "eval_dataset")
    draft.columns([*columns, *more], "dataset")
    share = float(draft.source.get("val_size") or 0)
    if held_out:
        draft.set("data.eval", held_out)
    elif 0 < share < 1:
        draft.set("data.eval_fraction", share)
    else:
        draft.set("data.eval_fraction", SHARE)
        key = "val_size" if share else "dataset"
        draft.add(key, NO_SHARE)


def _places(draft: Draft, key: str) -> tuple[list[str], list[dict[str, str]]]:
    """The data sets that a key names, and the columns that each of them names."""
    given = str(draft.source.get("dataset_dir") or "data")
    folder = draft.find(given)
    info: dict[str, Any] = {}
    if (folder / INFO).is_file():
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    found: list[str] = []
    unknown: list[str] = []
    columns = []
    for name in _names(draft.source.get(key)):
        entry = info.get(name, {})
        hub, file = entry.get("hf_hub_url"), entry.get("file_name")
        if not hub and not file:
            unknown.append(name)
            found.append(name)
            continue
        subset = f"/{entry['subset']}" if entry.get("subset") else ""
        found.append(f"hf://{hub}{subset}:{entry.get('split', 'train')}" if hub else draft.local(f"{given}/{file}"))
        columns.append(_columns(draft, entry))
        if unused := sorted(one for one, value in entry.items() if one not in READ and not _as_here(one, value)):
            draft.add(key, f"{name}: not taken: {', '.join(unused)}")
    if unknown:
        draft.add(key, f"{', '.join(unknown)}: no file or hub data set in {folder / INFO}; put the files' paths here")
    return found, columns


def _columns(draft: Draft, entry: dict[str, Any]) -> dict[str, str]:
    """Our field of each column that it names."""
    fields = {**COLUMNS, "prompt": "text"} if draft.job["task"] == "pretrain" else COLUMNS
    named = {fields[one]: column for one, column in (entry.get("columns") or {}).items() if one in fields}
    return {field: column for field, column in named.items() if column not in (field, "conversations")}


def _as_here(key: str, value: Any) -> bool:
    """Whether a setting of the rows' form says what is read anyway."""
    if key != "tags":
        return value in (False, None)
    known = {"role_tag": SPEAKERS, "content_tag": TEXTS}
    return all(given in known[tag] if tag in known else given in ROLES for tag, given in value.items())


RULES: dict[str, Rule] = {
    "model_name_or_path": Draft.model,
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "bf16": when(True, "model.dtype", "bfloat16"),
    "pure_bf16": when(True, "model.dtype", "bfloat16"),
    "flash_attn": chosen("model.attention", ATTENTION, "flash_attn", "model.attention is auto"),
    "cutoff_len": "data.max_length",
    "packing": "data.packing",
    "neat_packing": when(True, "data.packing", True),
    "num_train_epochs": number("train.epochs"),
    "max_steps": lambda draft, value: draft.set("train.steps", value) if int(value) > 0 else None,
    "learning_rate": number("train.learning_rate"),
    "lr_scheduler_type": chosen("train.schedule", SCHEDULES, "lr_scheduler_type", NO_SCHEDULE),
    "warmup_ratio": number("train.warmup_ratio"),
    "weight_decay": number("train.weight_decay"),
    "max_grad_norm": number("train.max_grad_norm"),
    "optim": chosen("train", ADAMW, "optim", NO_OPTIMIZER),
    "seed": "train.seed",
    "deepspeed": deepspeed,
    "gradient_checkpointing": checkpointing,
    "disable_gradient_checkpointing": when(True, "train.activation_checkpointing", "none"),
    "neftune_noise_alpha": number("train.neftune_alpha"),
    "torch_compile": when(True, "train.compile", True),
    "save_steps": lambda draft, value: draft.set("checkpoint.every_steps", value) if int(value) >= 1 else None,
    "save_total_limit": "checkpoint.keep",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "output_dir": lambda draft, value: draft.set("storage", draft.local(str(value))),
    "report_to": lambda draft, value: draft.set("report_to", FOLLOWED) if "wandb" in _names(value) else None,
    **dict.fromkeys(
        ("stage", "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "dataset",
         "eval_dataset", "dataset_dir", "val_size", "per_device_train_batch_size", "gradient_accumulation_steps",
         "warmup_steps", "do_train", "do_eval", "overwrite_cache", "preprocessing_num_workers",
         "dataloader_num_workers",
         "logging_steps", "plot_loss", "overwrite_output_dir", "ddp_timeout", "save_only_model", "logging_dir",
         "run_name", "include_num_input_tokens_seen", "cache_dir", "use_fast_tokenizer")
    ),
}  # fmt: skip
"""`None`: read elsewhere here, or without effect on what is trained."""

REFUSED = {
    "template": "the tokenizer's own chat template is used; data.chat_template names another",
    "fp16": "model.dtype is bfloat16 or float32; fp16 is not here",
    "quantization_bit": "weights are not quantized while they are trained",
    "quantization_method": "weights are not quantized while they are trained",
    "max_samples": "all rows are taken; name a smaller file",
    "train_on_prompt": "sft trains the assistant's tokens alone",
    "mask_history": "every turn of the assistant is trained; weight: 0 on a message leaves it out",
    "enable_thinking": "as the tokenizer's chat template has it",
    "resume_from_checkpoint": "the same command goes on by itself from what it committed",
    "adapter_name_or_path": "adapters start from scratch",
    "eval_strategy": "every checkpoint is evaluated: checkpoint.every_steps",
    "eval_steps": "every checkpoint is evaluated: checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps counts steps",
    "streaming": "shards are written once, then read from there",
    "mix_strategy": "weights of a mixture stand beside each path of data.train",
    "interleave_probs": "weights of a mixture stand beside each path of data.train",
    "use_galore": "the optimizer is AdamW with fp32 states",
    "use_badam": "the optimizer is AdamW with fp32 states",
    "use_unsloth": "not here",
    "enable_liger_kernel": LIGER,
    "use_dora": "not here",
    "use_rslora": "not here",
    "loraplus_lr_ratio": "not here",
    "rope_scaling": "positions stay as the model has them",
    "additional_target": "adapters alone are trained",
    "freeze_trainable_layers": "model.freeze names what stays, not what is trained",
    "push_to_hub": "`tuneyard registry push` sends a version when it is asked to",
    "adam_beta1": "AdamW's betas are 0.9 and 0.999",
    "adam_beta2": "AdamW's betas are 0.9 and 0.999",
}
"""By key: why it has no counterpart."""
