"""Keys of an axolotl configuration and what they are here."""

from pathlib import Path
from typing import Any

from orchestrator.importing.defaults import AXOLOTL, assume
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
from trainers.job.sections import LoraSection
from trainers.tasks.chat.conversations import ROLES, SPEAKERS, TEXTS

READ = frozenset(("path", "type", "ds_type", "data_files", "split", "name", "field_messages", "field", "text_column",
                  "field_instruction", "field_input", "field_output", "field_system"))  # fmt: skip
"""Keys of a data set that are read here."""
FIELDS = {"messages": ["field_messages"], "text": ["field", "text_column"], "instruction": ["field_instruction"],
          "input": ["field_input"], "output": ["field_output"], "system": ["field_system"]}  # fmt: skip
"""By our field: the keys that name its column."""
MOST_WARMUP = 100
"""Steps of the warm-up that is done without being asked for."""
LOCAL = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt")


def import_axolotl(draft: Draft) -> None:
    """Fill a draft from an axolotl configuration."""
    source, job = draft.source, draft.job
    lora = source.get("adapter") == "lora"
    apply(draft, RULES, REFUSED)
    left_out = {key for key in AXOLOTL if key.startswith("lora_") and not lora}
    left_out |= {"sample_packing"} if source.get("pretraining_dataset") else set()
    assume(draft, {key: one for key, one in AXOLOTL.items() if key not in left_out})
    _data(draft)
    size = int(source.get("micro_batch_size") or 1)
    steps = source.get("gradient_accumulation_steps") or int(source.get("batch_size") or size) // size
    batch(draft, "micro_batch_size", size, max(int(steps), 1))
    if lora:
        _lora(draft)
    elif source.get("adapter"):
        draft.tell("adapter", f"{source['adapter']} is not here: without model.lora all weights are trained in full")
    if source.get("learning_rate") is None:
        draft.told["learning_rate"] = "train.learning_rate is 5e-05; there the file must name it"
    warmup(draft, "lr_scheduler", MOST_WARMUP)
    _overlong(draft)
    if "steps" in job.get("train", {}):
        job["train"].pop("epochs", None)


def _lora(draft: Draft) -> None:
    source = draft.source
    modules = ["all-linear"] if source.get("lora_target_linear") else source.get("lora_target_modules")
    given = {"rank": source.get("lora_r"), "alpha": source.get("lora_alpha"), "dropout": source.get("lora_dropout"),
             "target_modules": modules}  # fmt: skip
    for name, value in lora_section(given).items():
        draft.set(f"model.lora.{name}", value)
    here = LoraSection()
    absent = [f"{name} {getattr(here, name)}" for name in ("rank", "alpha") if given[name] is None]
    absent += ["target_modules all-linear"] if not modules else []
    if absent:
        draft.told["adapter"] = f"model.lora is as here where the file names nothing: {', '.join(absent)}"


def _overlong(draft: Draft) -> None:
    """Conversations over sequence_len are dropped there unless the file says otherwise; texts are cut into several."""
    if draft.job["task"] != "sft":
        return
    wanted = str(draft.source.get("excess_length_strategy") or "drop").lower()
    draft.set("data.overlong", {"raise": "error"}.get(wanted, wanted))
    if wanted == "drop":
        draft.told["excess_length_strategy"] = (
            "rows longer than data.max_length are dropped, as there; data.max_drop_fraction says how many rows may be"
        )


def _data(draft: Draft) -> None:
    """Both splits, and the task that the kinds of the data sets mean."""
    train = [one for one in draft.source.get("datasets") or [] if isinstance(one, dict)]
    kinds = {_kind(one) for one in train}
    draft.set("task", "pretrain" if kinds == {"completion"} or draft.source.get("pretraining_dataset") else "sft")
    if odd := sorted(kinds - {"completion", "alpaca", "chat_template", "sharegpt", "input_output"}):
        draft.add("datasets", f"type {', '.join(odd)} is not known here")
    if unused := sorted({key for one in train for key in one if key not in READ and not _as_here(key, one[key])}):
        draft.add("datasets", f"not taken: {', '.join(unused)}")
    draft.set("data.train", [_place(draft, one, "datasets") for one in train])
    draft.columns(map(_columns, train), "datasets")
    held_out = [one for one in draft.source.get("test_datasets") or [] if isinstance(one, dict)]
    share = draft.source.get("val_set_size") or 0
    if held_out:
        draft.set("data.eval", [_place(draft, one, "test_datasets") for one in held_out])
    elif 0 < share < 1:
        draft.set("data.eval_fraction", float(share))
    else:
        draft.set("data.eval_fraction", SHARE)
        key = "val_set_size" if share else "datasets"
        draft.add(key, NO_SHARE)


def _kind(one: dict[str, Any]) -> str:
    """What its rows are; a format that the file describes itself has no name."""
    kind = one.get("type") or "completion"
    return "of its own" if isinstance(kind, dict) else str(kind).partition(".")[0]


def _columns(one: dict[str, Any]) -> dict[str, str]:
    """Our field of each column that it names."""
    fields = {field: next((one[key] for key in keys if one.get(key)), None) for field, keys in FIELDS.items()}
    return {field: column for field, column in fields.items() if column and column not in (field, "conversations")}


def _as_here(key: str, value: Any) -> bool:
    """Whether a setting of the rows' form says what is read anyway."""
    names = list(value.items()) if isinstance(value, dict) else [("", value)]
    if key == "roles":
        return all(ROLES.get(str(name)) == role for role, given in names if isinstance(given, list) for name in given)
    known = {"role": SPEAKERS, "content": TEXTS, "message_field_role": SPEAKERS, "message_field_content": TEXTS}
    return all(given in known.get(name or key, ()) for name, given in names)


def _place(draft: Draft, one: dict[str, Any], key: str) -> str:
    """A data set as data.train names it."""
    files = one.get("data_files")
    path = str((files[0] if isinstance(files, list) else files) or one.get("path"))
    if isinstance(files, list) and len(files) > 1:
        draft.add(key, f"of data_files {path} alone is taken: name the others too")
    if one.get("ds_type") or path.endswith(LOCAL) or path.startswith((".", "/", "s3://", "gs://")) or Path(path).suffix:
        return draft.local(path)
    config = f"/{one['name']}" if one.get("name") else ""
    split, bracket, part = str(one.get("split") or "train").partition("[")
    if bracket:
        draft.add(key, f"the whole split {split} is taken, not [{part}")
    return f"hf://{path}{config}:{split}"


def _length(draft: Draft, value: Any) -> None:
    draft.set("data.max_length", int(value))


RULES: dict[str, Rule] = {
    "base_model": Draft.model,
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "bf16": lambda draft, value: draft.set("model.dtype", "bfloat16" if value else "float32"),
    "bfloat16": lambda draft, value: draft.set("model.dtype", "bfloat16" if value else "float32"),
    "flash_attention": when(True, "model.attention", "flash_attention_2"),
    "sdp_attention": when(True, "model.attention", "sdpa"),
    "eager_attention": when(True, "model.attention", "eager"),
    "attn_implementation": "model.attention",
    "attention": chosen("model.attention", {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"},
                        "attention", "model.attention is auto"),
    "sequence_len": _length,
    "sample_packing": "data.packing",
    "num_epochs": number("train.epochs"),
    "max_steps": lambda draft, value: draft.set("train.steps", value) if int(value) > 0 else None,
    "learning_rate": number("train.learning_rate"),
    "lr_scheduler": chosen("train.schedule", SCHEDULES, "lr_scheduler", NO_SCHEDULE),
    "warmup_ratio": number("train.warmup_ratio"),
    "weight_decay": number("train.weight_decay"),
    "max_grad_norm": number("train.max_grad_norm"),
    "optimizer": chosen("train", ADAMW, "optimizer", NO_OPTIMIZER),
    "seed": "train.seed",
    "deepspeed": deepspeed,
    "gradient_checkpointing": checkpointing,
    "neftune_noise_alpha": number("train.neftune_alpha"),
    **dict.fromkeys(("sequence_parallel_degree", "context_parallel_size"), "train.sequence_parallel"),
    "torch_compile": when(True, "train.compile", True),
    "chat_template_jinja": "data.chat_template",
    "chat_template": chosen(
        "data", {"tokenizer_default": None}, "chat_template", "the tokenizer's own is used; or data.chat_template"
    ),
    "save_steps": lambda draft, value: draft.set("checkpoint.every_steps", value) if int(value) >= 1 else None,
    "save_total_limit": "checkpoint.keep",
    "early_stopping_patience": lambda draft, value: draft.set("evaluate.early_stopping", {"patience": int(value)}),
    "eval_batch_size": "evaluate.batch_size",
    "output_dir": lambda draft, value: draft.set("storage", draft.local(str(value))),
    "use_wandb": when(True, "report_to", ["tensorboard", "mlflow", "wandb"]),
    "wandb_project": lambda draft, value: draft.set("report_to", ["tensorboard", "mlflow", "wandb"]) if value else None,
    "mlflow_tracking_uri": "registry.uri",
    "mlflow_experiment_name": "registry.model",
    **dict.fromkeys(
        ("datasets", "test_datasets", "val_set_size", "micro_batch_size", "gradient_accumulation_steps", "adapter",
         "batch_size", "excess_length_strategy", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
         "lora_target_linear", "warmup_steps", "use_mlflow", "use_tensorboard", "model_type", "tokenizer_type",
         "is_llama_derived_model", "is_mistral_derived_model", "strict", "dataset_prepared_path", "logging_steps",
         "pad_to_sequence_len", "debug", "dataset_processes", "local_rank", "tf32", "xformers_attention",
         "auto_resume_from_checkpoints", "save_safetensors", "save_first_step", "dataloader_num_workers",
         "eval_sample_packing", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model",
         "gradient_checkpointing_kwargs", "ddp_timeout", "remove_unused_columns", "group_by_length")
    ),
}  # fmt: skip
"""`None`: read elsewhere here, or without effect on what is trained."""

REFUSED = {
    "load_in_8bit": "weights are not quantized while they are trained",
    "load_in_4bit": "weights are not quantized while they are trained",
    "fp16": "model.dtype is bfloat16 or float32; fp16 is not here",
    "float16": "model.dtype is bfloat16 or float32; fp16 is not here",
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"),
        "train.spike_factor rolls a loss that jumps back, in place of ending the run",
    ),
    **dict.fromkeys(
        ("eval_max_new_tokens", "eval_table_size", "do_causal_lm_eval", "do_bench_eval"),
        "evaluate.generate writes texts and scores them",
    ),
    **dict.fromkeys(
        (
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_cross_entropy",
            "liger_fused_linear_cross_entropy",
        ),
        LIGER,
    ),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), "not here; results are the same without"),
    "rl": "preference training is not here",
    "train_on_inputs": "sft trains the assistant's tokens alone; task: pretrain trains all",
    "unfrozen_parameters": "model.freeze names what stays, not what is trained",
    "special_tokens": "tokens of the model's tokenizer are kept as they are",
    "tokens": "the vocabulary stays as it is",
    "resume_from_checkpoint": "the same command goes on by itself from what it committed",
    "hub_model_id": "`tuneyard registry push` sends a version when it is asked to",
    "evals_per_epoch": "every checkpoint is evaluated: checkpoint.every_steps",
    "saves_per_epoch": "checkpoint.every_steps counts steps",
    "eval_steps": "every checkpoint is evaluated: checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps counts steps",
    "eval_strategy": "every checkpoint is evaluated: checkpoint.every_steps",
    "fsdp": "ZeRO keeps the state: train.deepspeed",
    "fsdp_config": "ZeRO keeps the state: train.deepspeed",
    "plugins": LIGER,
    "lora_modules_to_save": "adapters alone are trained",
    "lora_model_dir": "adapters start from scratch",
    "streaming": "shards are written once, then read from there",
    "pretraining_dataset": "name its files in data.train; without sample_packing data.packing is as here",
    "adam_beta2": "AdamW's betas are 0.9 and 0.999",
    "adam_beta1": "AdamW's betas are 0.9 and 0.999",
    "adam_epsilon": "AdamW's epsilon is 1e-8",
    "curriculum_sampling": "rows are shuffled by the seed",
    "loraplus_lr_ratio": "not here",
    "peft_use_dora": "not here",
    "peft_use_rslora": "not here",
}
"""By key: why it has no counterpart."""
