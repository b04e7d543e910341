"""Exports: bit-equal to the checkpoint in fp32, and written within the memory of the largest tensor plus 256 MiB."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import chat_rows, make_llama, tiny_job
from trainers.checkpoint.records import CheckpointState, FileRecord, Save
from trainers.checkpoint.tensor_file import spec_of, write_tensors
from trainers.checkpoint.writing import commit, write_share
from trainers.job.schema import Job
from trainers.storage import Folder

ALLOWANCE = 256 << 20


def write_checkpoint(folder: Folder, model: Any, world_size: int = 2) -> CheckpointState:
    """A model's fp32 weights as ranks under ZeRO-3 would write them, with moments of zero."""
    import torch

    weights = {name: parameter.detach().float().flatten() for name, parameter in model.named_parameters()}
    state = CheckpointState(
        step=1, world_size=world_size, zero_stage=3, tokens=1, train_key="k", job="j", trainable=tuple(weights),
        shapes={name: list(parameter.shape) for name, parameter in model.named_parameters()},
    )  # fmt: skip
    votes = []
    for rank in reversed(range(world_size)):
        tensors, starts = {}, {}
        for name, weight in weights.items():
            part = -(-len(weight) // world_size)
            starts[name] = part * rank
            mine = weight[part * rank : part * (rank + 1)]
            tensors |= {f"weight/{name}": mine, f"exp_avg/{name}": torch.zeros_like(mine)}
        stream = io.BytesIO()
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        write_tensors(stream, specs, tensors.__getitem__, {"starts": json.dumps(starts)})
        save = Save(id="one", rank=rank, world_size=world_size)
        votes.append(write_share(folder, save, stream.getbuffer(), 1))
    commit(folder, votes[-1], world_size, state)
    return state


def export_here(job: Job, checkpoint: str, out: str) -> None:
    from trainers.checkpoint.export import export_checkpoint
    from trainers.tasks import load_task

    export_checkpoint(Folder(checkpoint), Folder(out), job, load_task("sft"), job.model.path)


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_logits_are_those_of_the_model_in_the_checkpoint(
    tmp_path: Path, tiny_chat_tokenizer: Path, tied: bool
) -> None:
    """Odd sizes, so that the ranks' parts are unequal; the pretrained folder holds other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer, seed=1, tied=tied)
    trained = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "x", tiny_chat_tokenizer, seed=2, tied=tied))
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10))
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), trained, world_size=3)
    export_here(job, str(tmp_path / "checkpoint"), str(tmp_path / "export"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert exported(tokens).logits.equal(trained.eval()(tokens).logits)
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied


def run_within(group: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program inside a control group."""
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", enter + code, *arguments],
        capture_output=True, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip


EXPORT = """
import sys
from tests.trainers.checkpoint.test_export import export_here
from trainers.job.load import parse_job
import json
export_here(parse_job(json.loads(sys.argv[1])), *sys.argv[2:])
"""
LOAD_WHOLE = """
import sys
from safetensors.torch import load_file
from pathlib import Path
held = [load_file(path) for path in Path(sys.argv[1]).glob("*.safetensors")]
held = [{name: tensor.clone() for name, tensor in file.items()} for file in held]
"""


@pytest.mark.slow
def test_an_export_needs_the_largest_tensor_and_256_mib_whatever_the_model(
    tmp_path: Path, tiny_chat_tokenizer: Path, cgroup: Any
) -> None:
    """540 MB of checkpoint under a limit of 391 MB, which kills a process that holds all of it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=30_000, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8,
                         intermediate_size=1536, tie_word_embeddings=True, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    config.save_pretrained(pretrained)
    model = AutoModelForCausalLM.from_config(config)
    checkpoint = Folder(str(tmp_path / "checkpoint"))
    state = write_checkpoint(checkpoint, model)
    largest = max(4 * parameter.numel() for parameter in model.parameters())
    assert sum(checkpoint.size(name) for name in checkpoint.list()) > largest + ALLOWANCE
    del model
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10))
    limit = largest + ALLOWANCE
    whole = run_within(cgroup(limit), LOAD_WHOLE, str(checkpoint.path))
    assert whole.returncode == -9, "the limit would not have been felt"
    done = run_within(cgroup(limit), EXPORT, job.model_dump_json(), str(checkpoint), str(tmp_path / "export"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "export" / "tuneyard.json").read_text())
    assert FileRecord(**record["files"]["model.safetensors"]).bytes > 4 * 1024 * 30_000
    assert state.step == record["step"]
