"""Runs with adapters: merged within the memory of the largest tensor plus 256 MiB, or the adapters alone, for PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import chat_rows, film_rows, make_bert, make_llama, shard_locally, tiny_job
from tests.trainers.checkpoint.test_export import ALLOWANCE, EXPORT, LOAD_WHOLE, run_within, write_checkpoint
from trainers.checkpoint.adapter_export import export_adapter
from trainers.checkpoint.export import export_checkpoint
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.storage import Folder


def adapted(folder: Path, model: Path, task: str, rows: list[dict[str, Any]], **lora: Any) -> tuple[Job, Any]:
    """A job with adapters that learned something, its checkpoint in folder/checkpoint, and the job's task."""
    import torch

    from trainers.model.engine import prepare_model
    from trainers.run.record import find_run

    job = tiny_job(folder, model, task, rows)
    job = job.model_copy(update={"model": job.model.model_copy(update={"lora": LoraSection(rank=2, **lora)})})
    shard_locally(job)
    own = find_run(job).load_task()
    loaded = prepare_model(own.load_model(str(model), pad_id=0, trust_remote_code=False), job, own)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in loaded.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    write_checkpoint(Folder(str(folder / "checkpoint")), loaded)
    return job, own


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_plain_peft_over_the_base_gives_the_merged_exports_logits(
    tmp_path: Path, tiny_chat_tokenizer: Path, targets: tuple[str, ...]
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_llama(tmp_path / "base", tiny_chat_tokenizer)
    job, task = adapted(tmp_path, base, "sft", chat_rows(10), target_modules=targets)
    checkpoint = Folder(str(tmp_path / "checkpoint"))
    export_checkpoint(checkpoint, Folder(str(tmp_path / "merged")), job, task, str(base))
    told = export_adapter(checkpoint, Folder(str(tmp_path / "adapter")), job, task, str(base))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {*told.files, "tuneyard.json"}
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(tokens).logits
    assert (alone - merged).abs().max() < 1e-5 < 1e-2 < (plain - merged).abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["inference_mode"]


def test_a_new_head_goes_with_its_adapters(tmp_path: Path, tiny_tokenizer: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    base = make_bert(tmp_path / "base", tiny_tokenizer)
    rows = [row | {"label": f"{row['label']} {at % 3}"} for at, row in enumerate(film_rows(40))]
    job, task = adapted(tmp_path, base, "classify", rows)
    checkpoint = Folder(str(tmp_path / "checkpoint"))
    export_checkpoint(checkpoint, Folder(str(tmp_path / "merged")), job, task, str(base))
    export_adapter(checkpoint, Folder(str(tmp_path / "adapter")), job, task, str(base))
    auto, config = AutoModelForSequenceClassification, AutoConfig.from_pretrained(tmp_path / "adapter")
    assert config.label2id.keys() == set(task.labels) and len(task.labels) > 2
    alone = PeftModel.from_pretrained(auto.from_pretrained(base, config=config), tmp_path / "adapter").eval()
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    with torch.no_grad():
        assert (alone(tokens).logits - merged(tokens).logits).abs().max() < 1e-5


@pytest.mark.slow
def test_merging_needs_the_largest_tensor_and_256_mib_whatever_the_base(
    tmp_path: Path, tiny_chat_tokenizer: Path, cgroup: Any
) -> None:
    """A base of 408 MB under a limit of 391 MB, which kills a process that holds it whole."""
    base = make_llama(tmp_path / "base", tiny_chat_tokenizer, vocab_size=30_000, hidden_size=1024, num_hidden_layers=8,
                      num_attention_heads=8, num_key_value_heads=8, intermediate_size=1536)  # fmt: skip
    job, _ = adapted(tmp_path, base, "sft", chat_rows(10))
    limit = 4 * 30_000 * 1024 + ALLOWANCE
    assert (base / "model.safetensors").stat().st_size > limit
    whole = run_within(cgroup(limit), LOAD_WHOLE, str(base))
    assert whole.returncode == -9, "the limit would not have been felt"
    words = (job.model_dump_json(), str(tmp_path / "checkpoint"), str(tmp_path / "export"))
    done = run_within(cgroup(limit), EXPORT, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "export" / "tuneyard.json").exists()
