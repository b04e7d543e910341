"""Exports: bit-equal to the checkpoint in fp32, and written within the memory of the largest tensor plus 256 MiB."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import chat_rows, film_rows, make_bert, make_llama, shard_locally, tiny_job
from trainers.checkpoint.records import CheckpointState, FileRecord, Save
from trainers.checkpoint.writing import commit, write_share
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.storage import Folder
from trainers.tensor_file import spec_of, write_tensors

ALLOWANCE = 256 << 20


def write_checkpoint(folder: Folder, model: Any, world_size: int = 2) -> CheckpointState:
    """A model's fp32 weights, those that train, as ranks under ZeRO-3 would write them, with moments of zero."""
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter.detach().float().flatten() for name, parameter in trained.items()}
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


def test_numbers_that_transformers_keeps_under_another_name_stay_for_other_readers(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    from transformers import AutoModelForCausalLM

    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    file = pretrained / "config.json"
    published = json.loads(file.read_text())
    published.pop("rope_parameters")
    file.write_text(json.dumps({**published, "rope_theta": 5000.0, "torch_dtype": "float16"}))
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10))
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), AutoModelForCausalLM.from_pretrained(pretrained))
    export_here(job, str(tmp_path / "checkpoint"), str(tmp_path / "export"))
    said = json.loads((tmp_path / "export" / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 5000.0
    assert said["dtype"] == job.model.dtype and "torch_dtype" not in said


def run_within(group: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program inside a control group."""
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", enter + code, *arguments],
        capture_output=True, text=True, timeout=400, check=False, env=environment,
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


PLAIN = """
import json, sys, torch
import transformers
assert not any(name.split(".")[0] in ("trainers", "orchestrator") for name in sys.modules)
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 3)
tokens = torch.arange(20).view(1, 20) % 30
with torch.no_grad():
    print(json.dumps(model.eval()(tokens).logits.tolist()))
"""


def plain_logits(folder: Path, auto: str, *more: str) -> Any:
    """What a process without this project, with plain transformers, makes of a folder."""
    import torch

    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, str(folder), auto, *more],
                          capture_output=True, text=True, timeout=400, check=False, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(20).view(1, 20) % 30).logits


def test_experts_are_exported_under_the_names_they_are_published_with(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=1, head_dim=16, intermediate_size=48, moe_intermediate_size=24,
                            num_experts=4, num_experts_per_tok=2, pad_token_id=0)  # fmt: skip
    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    (pretrained / "model.safetensors").unlink()
    Qwen3MoeForCausalLM(config).save_pretrained(pretrained)
    trained = AutoModelForCausalLM.from_pretrained(pretrained)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10))
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), trained)
    export_here(job, str(tmp_path / "checkpoint"), str(tmp_path / "export"))
    with (
        safe_open(tmp_path / "export" / "model.safetensors", "pt") as ours,
        safe_open(pretrained / "model.safetensors", "pt") as published,
    ):
        assert set(ours.keys()) == set(published.keys())
        assert "model.layers.1.mlp.experts.3.gate_proj.weight" in ours.keys()  # noqa: SIM118
    assert plain_logits(tmp_path / "export", "AutoModelForCausalLM").allclose(logits_of(trained), atol=1e-6)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 2
        return output
"""


def test_a_model_with_code_of_its_own_is_exported_with_it(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM

    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    before = logits_of(AutoModelForCausalLM.from_pretrained(pretrained))
    (pretrained / "own.py").write_text(REMOTE)
    config = json.loads((pretrained / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}  # fmt: skip
    (pretrained / "config.json").write_text(json.dumps(config))
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10))
    job = job.model_copy(update={"model": job.model.model_copy(update={"trust_remote_code": True})})
    trained = AutoModelForCausalLM.from_pretrained(pretrained, trust_remote_code=True)
    assert logits_of(trained).allclose(2 * before, atol=1e-5), "the code of the folder is at work"
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), trained)
    export_here(job, str(tmp_path / "checkpoint"), str(tmp_path / "export"))
    assert plain_logits(tmp_path / "export", "AutoModelForCausalLM", "trust").allclose(logits_of(trained), atol=1e-6)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"


def test_the_template_and_the_end_of_a_turn_are_those_of_the_training(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{{ 'another' }}"
    tokenizer.save_pretrained(pretrained)
    GenerationConfig(eos_token_id=1, max_new_tokens=7).save_pretrained(pretrained)
    job = tiny_job(tmp_path, pretrained, "sft", chat_rows(10), data={"chat_template": TEMPLATE})
    from transformers import AutoModelForCausalLM

    from trainers.checkpoint.export import export_checkpoint
    from trainers.tasks import load_task, task_options

    write_checkpoint(Folder(str(tmp_path / "checkpoint")), AutoModelForCausalLM.from_pretrained(pretrained))
    task = load_task("sft", task_options(job))
    out = tmp_path / "export"
    export_checkpoint(Folder(str(tmp_path / "checkpoint")), Folder(str(out)), job, task, job.model.path)
    exported = AutoTokenizer.from_pretrained(out)
    said = exported.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<user>hi<|im_end|>\n"
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [1, exported.convert_tokens_to_ids("<|im_end|>")]
    assert generation.max_new_tokens == 7
    record = json.loads((out / "tuneyard.json").read_text())
    assert set(record["files"]) == {path.name for path in out.iterdir()} - {"tuneyard.json"}


def adapted_without_pooler(tmp_path: Path, tokenizer: Path, task: str, rows: Any, **sections: Any) -> tuple[Job, Any]:
    """A job with adapters on a folder without a pooler, with a checkpoint of it, and the job's task."""
    from safetensors.torch import load_file, save_file

    from trainers.model.engine import prepare_model
    from trainers.run.record import find_run

    pretrained = make_bert(tmp_path / "pretrained", tokenizer)
    file = pretrained / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if "pooler" not in name}
    save_file(kept, file, {"format": "pt"})
    job = tiny_job(tmp_path, pretrained, task, rows, **sections)
    job = job.model_copy(update={"model": job.model.model_copy(update={"lora": LoraSection(rank=2)})})
    shard_locally(job)
    own = find_run(job).load_task()
    loaded = own.load_model(str(pretrained), pad_id=0, trust_remote_code=False)
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), prepare_model(loaded, job, own))
    return job, own


def test_frozen_weights_that_are_nowhere_are_named(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from trainers.checkpoint.export import export_checkpoint

    job, task = adapted_without_pooler(tmp_path, tiny_tokenizer, "classify", film_rows(20))
    with pytest.raises(EvaluationError, match=r"2 frozen weights are not in .*bert\.pooler\.dense\.bias.* at random"):
        export_checkpoint(Folder(str(tmp_path / "checkpoint")), Folder(str(tmp_path / "e")), job, task, job.model.path)


def test_frozen_weights_that_nobody_reads_are_zeros(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from transformers import AutoModel

    from trainers.checkpoint.export import export_checkpoint

    texts = [row["text"] for row in film_rows(20)]
    pairs = [{"sentence1": text, "sentence2": text, "score": at % 2} for at, text in enumerate(texts)]
    train = {"objective": "cosine"}
    job, task = adapted_without_pooler(tmp_path, tiny_tokenizer, "similarity", pairs, train=train)
    out = Folder(str(tmp_path / "e"))
    export_checkpoint(Folder(str(tmp_path / "checkpoint")), out, job, task, job.model.path)
    model, info = AutoModel.from_pretrained(out.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not model.pooler.dense.weight.any() and model.encoder.layer[1].output.dense.weight.any()


def test_what_a_killed_export_left_does_not_stop_the_next(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it wrote the weights: what lies there at that moment is copied, for an exception would tidy up."""
    from transformers import AutoModelForCausalLM

    from orchestrator.registry.digests import list_files
    from trainers.checkpoint import export
    from trainers.pretrained import weight_files

    pretrained = make_llama(tmp_path / "pretrained", tiny_chat_tokenizer)
    job, checkpoint = tiny_job(tmp_path, pretrained, "sft", chat_rows(10)), str(tmp_path / "checkpoint")
    write_checkpoint(Folder(checkpoint), AutoModelForCausalLM.from_pretrained(pretrained))

    def killed(_: Any, out: Folder, *rest: Any) -> None:
        shutil.copytree(out.path, tmp_path / "left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write_weights", killed)
        export_here(job, checkpoint, str(tmp_path / "first"))
    left = tmp_path / "left"
    assert any(path.is_dir() for path in left.iterdir()), "the scratch folder"
    (left / ".tmp-1234-model.safetensors").write_bytes(b"half")
    (left / ".tuneyard-abcd").mkdir()  # as an earlier version named it
    export_here(job, checkpoint, str(left))
    export_here(job, checkpoint, str(tmp_path / "whole"))
    assert [file.name for file in weight_files(left)] == ["model.safetensors"]
    assert list_files(Folder(str(left))).keys() == list_files(Folder(str(tmp_path / "whole"))).keys()
    export.clear_leftovers(Folder(str(left)))
    assert {path.name for path in left.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
