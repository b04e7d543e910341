"""transformers' Trainer and TRL's SFTTrainer under DeepSpeed's ZeRO-3 on CPU ranks, as compared in `bench_loop.py`.

accelerate takes a CPU for a machine without DeepSpeed. A `PartialState` made beforehand, with gloo and without `cpu`,
leads it to DeepSpeed, whose own choice of accelerator is the CPU (DS_ACCELERATOR). That the engine is one of ZeRO-3 is
looked at before anything is measured. Both peers get our DeepSpeed configuration, fused AdamW and fp32; neither logs.
"""

import os
from pathlib import Path
from typing import Any

from tests.benchmarks.loop.contenders import LENGTH, RANKS, RATE, batches, configuration, shape_of
from tests.benchmarks.loop.turns import Turns


def settings(job: Any) -> dict[str, Any]:
    """Arguments of both trainers. To be called before a model is loaded, for ZeRO-3 partitions it then."""
    import deepspeed
    from accelerate import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as our ranks do
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    count, micro = shape_of(job)
    state = PartialState(backend="gloo")
    assert (state.num_processes, state.device.type) == (RANKS, "cpu")
    return dict(  # noqa: C408
        output_dir=str(Path(job.storage) / "peer"), deepspeed=configuration(job), max_steps=job.train.steps,
        accelerator_config={"use_configured_state": True}, per_device_train_batch_size=micro,
        gradient_accumulation_steps=count // RANKS // micro, learning_rate=RATE, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=job.train.max_grad_norm, optim="adamw_torch_fused", save_strategy="no",
        logging_first_step=True, logging_steps=10**6, report_to=[], disable_tqdm=True, log_level="error", bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip


def mixed(base: Any, turns: Turns) -> Any:
    """A trainer class that takes turns, and counts the tokens that are no padding."""
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        tokens = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            turns.next(self.tokens)
            self.tokens = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            turns.first = turns.first or (logs or {}).get("loss")

    class Peer(base):  # type: ignore[misc]
        clock = Clock()

        def training_step(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.clock.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *given, **named)

        def train_all(self) -> None:
            self.add_callback(self.clock)
            self.remove_callback(PrinterCallback)
            self.add_callback(First(self))
            self.train()

    class First(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_train_begin(self, *_: Any, **given: Any) -> None:
            engine = self.trainer.model_wrapped
            assert (type(engine).__name__, engine.zero_optimization_stage()) == ("DeepSpeedEngine", 3), type(engine)
            turns.next(0)

    return Peer


def trainer(job: Any, turns: Turns, **more: Any) -> None:
    """transformers' Trainer on our rows, padded to the longest of each micro-batch; each step gets the rows of ours."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(**settings(job), **more)
    model = AutoModelForCausalLM.from_pretrained(job.model.path)
    rows = [{"input_ids": ids} for step in batches(job) for ids in step]

    def collate(few: list[Any]) -> dict[str, Any]:
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in few], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in few], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    class InOrder(mixed(Trainer, turns)):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any) -> Any:
            return super()._get_train_sampler(*given) if more else torch.utils.data.SequentialSampler(rows)

    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate).train_all()


def grouped(job: Any, turns: Turns) -> None:
    """The same with its own grouping of rows by length, which it does when asked; the rows of a step are others."""
    trainer(job, turns, train_sampling_strategy="group_by_length")


def trl(job: Any, turns: Turns) -> None:
    """TRL's SFTTrainer with its packing, as it is but for what the others have alike."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    whole = AutoModelForCausalLM.from_pretrained(job.model.path)
    arguments = SFTConfig(**settings(job), packing=True, max_length=LENGTH)
    model = AutoModelForCausalLM.from_pretrained(job.model.path)
    rows = datasets.Dataset.from_dict({"input_ids": [ids.tolist() for step in batches(job) for ids in step]})
    tokenizer = AutoTokenizer.from_pretrained(job.model.path)
    peer = mixed(SFTTrainer, turns)(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    check_apart(whole, peer.data_collator([peer.train_dataset[place] for place in range(shape_of(job)[1])]))
    del whole
    peer.train_all()


def check_apart(model: Any, batch: dict[str, Any]) -> None:
    """A row of documents that saw each other would be another computation, whatever its time."""
    import torch

    told = {name: each for name, each in batch.items() if name != "labels"}
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    with torch.no_grad():
        together = model(**told, use_cache=False).logits[0]
        alone = [model(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits[0]
                 for start, end in zip(starts, [*starts[1:], len(together)], strict=True)]  # fmt: skip
    apart = (together - torch.cat(alone)).abs().max().item()
    if len(starts) < 2 or apart > 1e-4:
        raise SystemExit(f"TRL's packs of {len(starts)} documents give other logits than each alone: up to {apart}")
