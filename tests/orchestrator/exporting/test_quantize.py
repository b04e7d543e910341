"""`tuneyard export --quantize`: what is kept loads in plain transformers, what lost too much is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.tiny import chat_rows, film_rows, make_bert, make_llama, shard_locally, tiny_job
from tests.trainers.checkpoint.test_export import write_checkpoint
from trainers.errors import EvaluationError, JobError
from trainers.run.folder import step_name
from trainers.run.record import Run, find_run

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
OVERLAY = Path(sys.prefix) / "quantize"
needs_torchao = pytest.mark.skipif(not OVERLAY.is_dir(), reason=f"no torchao in {OVERLAY}: `make .venv/dev.stamp`")


def make_run(folder: Path, model: Path, task: str, rows: list[dict[str, Any]], trained: Any = None) -> Run:
    """A run with one checkpoint, of step 3."""
    job = tiny_job(folder, model, task, rows)
    shard_locally(job)
    run = find_run(job)
    run.folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    loaded = run.load_task().load_model(job.model.path, pad_id=0, trust_remote_code=False)
    if trained:
        trained(run, loaded)
    write_checkpoint(run.checkpoints / step_name(3), loaded)
    return run


def learn(run: Run, model: Any) -> None:
    """A minute's worth of knowledge in a second: a model that knows nothing loses nothing by being broken."""
    import torch

    torch.manual_seed(0)
    shards = run.open_held(run.load_task())[""]
    rows = [torch.tensor([shards.row(row).input_ids.tolist()]) for row in range(len(shards.lengths))]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        row = rows[step % len(rows)]
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Run:
    folder = tmp_path_factory.mktemp("quantize")
    return make_run(folder, make_llama(folder / "model", tiny_chat_tokenizer, **SIZES), "sft", chat_rows(40), learn)


def call(*words: object) -> Any:
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] in ("trainers", "orchestrator") for name in sys.modules)
options = {"gguf_file": sys.argv[2]} if sys.argv[2:] else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **options).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
turns = [{"role": "user", "content": "is the film good"}]
with torch.no_grad():
    logits = model(torch.arange(20).view(1, 20)).logits.tolist()
kinds = sorted({type(weight.data).__name__ for weight in model.parameters()})
print(json.dumps({"logits": logits, "text": tokenizer.apply_chat_template(turns, tokenize=False), "kinds": kinds}))
"""


def plain(folder: Path, *words: str, **environment: str) -> Any:
    """What a process without this project makes of a folder."""
    done = subprocess.run([sys.executable, "-c", PLAIN, str(folder), *words], capture_output=True, text=True,
                          timeout=400, check=False, cwd=folder, env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_q8_0_is_judged_and_plain_transformers_loads_it_with_its_template(chat_run: Run, tmp_path: Path) -> None:
    import torch
    from gguf import GGMLQuantizationType, GGUFReader, quantize
    from transformers import AutoModelForCausalLM

    out = tmp_path / "small"
    verdict = json.loads(call(chat_run.folder, "--quantize", "q8_0", "--out", out, "--json"))
    assert verdict["kept"] and verdict["low"] <= verdict["difference"] <= verdict["high"] <= verdict["allowance"]
    assert verdict["rows"] == 8 and verdict["bytes"] < 0.5 * verdict["unquantized_bytes"]
    assert json.loads((out / "quantization.json").read_text()) == verdict
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    assert "tiny-q8_0.gguf" in json.loads((out / "tuneyard.json").read_text())["files"]
    exported = AutoModelForCausalLM.from_pretrained(verdict["model"], dtype=torch.float32).eval()
    found = plain(out, "tiny-q8_0.gguf")
    with torch.no_grad():
        logits = exported(torch.arange(20).view(1, 20)).logits
    assert 0 < (torch.tensor(found["logits"]) - logits).abs().max() < 0.05 * logits.abs().max()
    assert found["text"] == "<|im_start|>user\nis the film good<|im_end|>\n"
    tensors = {tensor.name: tensor for tensor in GGUFReader(out / "tiny-q8_0.gguf").tensors}
    embedding = exported.model.embed_tokens.weight.detach().numpy()
    assert (tensors["token_embd.weight"].data == quantize(embedding, GGMLQuantizationType.Q8_0)).all()
    assert tensors["blk.0.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32


def break_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's scales, forty times too large."""
    from trainers.architecture.ggml import GgmlModel

    rows = GgmlModel.rows

    def broken(self: GgmlModel, name: str, weight: Any) -> Any:
        return rows(self, name, weight) * (40 if name == "blk.1.ffn_down.weight" else 1)

    monkeypatch.setattr(GgmlModel, "rows", broken)


def test_a_bad_quantization_is_refused_and_nothing_of_it_is_left(
    chat_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_a_layer(monkeypatch)
    words = (chat_run.folder, "--quantize", "q8_0", "--out", tmp_path / "small")
    with pytest.raises(EvaluationError, match=r"q8_0 refused: .* interval \[.*is allowed; the numbers are in") as told:
        call(*words)
    assert told.value.exit_code == 6
    assert {path.name for path in tmp_path.iterdir()} == {"small.refused.json"}
    verdict = json.loads((tmp_path / "small.refused.json").read_text())
    assert not verdict["kept"] and verdict["high"] > verdict["allowance"]
    monkeypatch.undo()
    call(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(
    chat_run: Run, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    run = make_run(tmp_path / "run", make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    out = ("--out", tmp_path / "small")
    with pytest.raises(JobError, match=r"q8_0: it writes causal models.*take int8 or fp8"):
        call(run.folder, "--quantize", "q8_0", *out)
    with pytest.raises(JobError, match="there are q8_0, int8, fp8"):
        call(run.folder, "--quantize", "q4_k", *out)
    with pytest.raises(JobError, match=r"pip install 'tuneyard\[quantize\]'"):
        call(run.folder, "--quantize", "int8", *out)
    with pytest.raises(JobError, match=r"without model\.lora"):
        call(run.folder, "--adapter", *out)
    with pytest.raises(JobError, match="choose one"):
        call(chat_run.folder, "--adapter", "--quantize", "q8_0", *out)
    with pytest.raises(JobError, match="allowance"):
        call(chat_run.folder, "--quantize", "q8_0", "--allowance", "1.5", *out)
    assert not run.folder.exists("export") and not out[1].exists()


WITH_TORCHAO = """
import json, sys
from unittest import mock
from typer.testing import CliRunner
from orchestrator.cli import app
from trainers.quantization import with_torchao
run, out = sys.argv[1:]
usual = with_torchao.quantize_weight

def broken(weight, form):
    made = usual(weight, form)
    if weight.device.type != "meta" and weight.shape == (64, 96):
        made.scale.mul_(40)
    return made

for name, form, quantize in (("int8", "int8", usual), ("fp8", "fp8", usual), ("bad", "int8", broken)):
    with mock.patch.object(with_torchao, "quantize_weight", quantize):
        words = ["export", run, "--quantize", form, "--out", f"{out}/{name}", "--json"]
        done = CliRunner().invoke(app, words)
    print("VERDICT", json.dumps([json.loads(done.stdout), repr(done.exception)]))
"""


@needs_torchao
@pytest.mark.slow
def test_int8_and_fp8_are_judged_and_plain_transformers_loads_them(chat_run: Run, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = os.pathsep.join([str(OVERLAY), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", WITH_TORCHAO, str(chat_run.folder), str(tmp_path)],
                          capture_output=True, text=True, timeout=400, check=False,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("VERDICT ") for line in done.stdout.splitlines() if line.startswith("VERDICT ")]
    (int8, _), (fp8, _), (bad, error) = map(json.loads, lines)
    assert int8["kept"] and fp8["kept"] and not bad["kept"] and "EvaluationError" in error and "refused" in error
    assert {path.name for path in tmp_path.iterdir()} == {"int8", "fp8", "bad.refused.json"}
    exported = AutoModelForCausalLM.from_pretrained(int8["model"]).eval()
    with torch.no_grad():
        logits = exported(torch.arange(20).view(1, 20)).logits
    for name, kind, bound in (("int8", "Int8Tensor", 0.05), ("fp8", "Float8Tensor", 0.2)):
        assert not list((tmp_path / name).glob("*.bin"))
        found = plain(tmp_path / name, PYTHONPATH=str(OVERLAY))
        assert kind in found["kinds"]
        assert 0 < (torch.tensor(found["logits"]) - logits).abs().max() < bound * logits.abs().max()
