"""`tuneyard import`: axolotl's or LLaMA-Factory's file becomes a job, and what has no counterpart is listed."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.importing import axolotl, llamafactory
from orchestrator.importing.command import import_job
from trainers.errors import JobError
from trainers.job.load import load_job

AXOLOTL = """
base_model: acme/llama
load_in_8bit: false
datasets:
  - {path: acme/chats, type: chat_template, split: train}
  - {path: rows.jsonl, ds_type: json, type: alpaca, field_output: answer, roles_to_train: [assistant]}
val_set_size: 0.1
output_dir: ./out
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sequence_len: 2048
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 2
max_steps: 200
num_epochs: 3
warmup_steps: 10
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
flash_attention: true
saves_per_epoch: 1
loss_watchdog_threshold: 5.0
special_tokens: {pad_token: "<pad>"}
wandb_project: mine
deepspeed: deepspeed_configs/zero2.json
"""
LLAMA_FACTORY = """
model_name_or_path: acme/qwen
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_offload_config.json
dataset: mine,theirs,lost
template: qwen3
cutoff_len: 1024
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 2.0
lr_scheduler_type: linear
val_size: 0.05
save_steps: 500
logging_steps: 10
quantization_bit: 4
"""


def imported(folder: Path, text: str) -> tuple[dict[str, str], Path]:
    (folder / "theirs.yaml").write_text(text)
    out = folder / "job.yaml"
    return import_job(folder / "theirs.yaml", out), out


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs take paths from the working directory."""
    monkeypatch.chdir(tmp_path)


def test_axolotls_values_are_in_the_job_and_the_rest_is_listed(tmp_path: Path) -> None:
    told, out = imported(tmp_path, AXOLOTL)
    job = load_job(out, ())
    assert (job.task, job.model.path, job.model.attention) == ("sft", "acme/llama", "flash_attention_2")
    assert job.model.lora is not None and (job.model.lora.rank, job.model.lora.alpha) == (8, 16.0)
    assert job.data.train_paths == ("hf://acme/chats:train", str(tmp_path / "rows.jsonl"))
    assert job.data.columns == {"output": "answer"} and job.data.eval_fraction == 0.1 and job.packing
    train = job.train
    assert (train.steps, train.epochs, train.learning_rate, train.warmup_ratio) == (200, None, 2e-4, 0.05)
    assert (train.global_batch_size, train.micro_batch_size, train.deepspeed) == (8, 2, "zero2")
    assert train.activation_checkpointing == "full" and "wandb" in job.report_to
    assert told.keys() == {"optimizer", "loss_watchdog_threshold", "saves_per_epoch", "special_tokens", "datasets",
                           "micro_batch_size", "excess_length_strategy", "keys left out"}  # fmt: skip
    assert "roles_to_train" in told["datasets"] and "columns differently" in told["datasets"]
    assert all(f"#   {key}: {what}" in out.read_text() for key, what in told.items())


def test_llama_factorys_data_sets_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {"mine": {"file_name": "mine.json", "columns": {"response": "answer"}},
            "theirs": {"hf_hub_url": "acme/set", "subset": "en"}}  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    told, out = imported(tmp_path, LLAMA_FACTORY)
    job = load_job(out, ())
    assert job.model.lora is None and job.train.deepspeed == "zero3-cpu-offload"
    mine = str(tmp_path / "data" / "mine.json")
    assert job.data.train_paths == (mine, "hf://acme/set/en:train", str(tmp_path / "lost"))
    assert job.data.columns == {"output": "answer"} and job.data.eval_fraction == 0.05
    assert (job.train.epochs, job.train.schedule, job.train.global_batch_size) == (2.0, "linear", 8)
    assert told.keys() == {"template", "quantization_bit", "dataset", "per_device_train_batch_size", "cutoff_len",
                           "keys left out"}  # fmt: skip
    assert "lost: no file or hub data set in" in told["dataset"]


def test_what_llama_factorys_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    told, out = imported(tmp_path, "model_name_or_path: acme/qwen\ndataset: mine\nlora_rank:\n")
    job = load_job(out, ())
    train, lora = job.train, job.model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (
        8,
        16,
        0,
        ("all-linear",),
    )
    assert (job.data.max_length, job.packing, job.overlong) == (2048, False, "truncate")
    assert (train.global_batch_size, train.micro_batch_size, train.epochs, train.learning_rate) == (8, 8, 3, 5e-5)
    assert (train.schedule, train.warmup_ratio, train.weight_decay, train.max_grad_norm) == ("linear", 0, 0, 1)
    for word in (
        "train.weight_decay 0.0",
        "model.lora.alpha 16.0",
        'schedule "linear"',
        "as here: model.dtype, train.seed",
    ):
        assert word in told["keys left out"], word


def test_what_axolotls_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    text = "base_model: acme/llama\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: chat_template}]\n"
    told, out = imported(tmp_path, text + "batch_size: 8\nmicro_batch_size: 2\n")
    job, train = load_job(out, ()), load_job(out, ()).train
    assert (job.data.max_length, job.packing, job.overlong, job.model.lora) == (512, False, "drop", None)
    assert (train.global_batch_size, train.micro_batch_size, train.epochs) == (8, 2, 1)
    assert (train.schedule, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0)
    assert "at most 100 steps" in told["warmup_ratio"] and "max_drop_fraction" in told["excess_length_strategy"]
    assert "train.warmup_ratio 0.03" in told["keys left out"] and "learning_rate" not in told
    out.unlink()
    told, out = imported(tmp_path, text + "adapter: lora\nlora_r: 4\nmax_steps: 10000\nexcess_length_strategy: raise\n")
    job = load_job(out, ())
    assert (job.train.warmup_ratio, job.train.epochs, job.overlong) == (0.01, None, "error")
    assert (
        "alpha 32.0" in told["adapter"]
        and "rank" not in told["adapter"]
        and "train.epochs" not in told["keys left out"]
    )


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("stage: pt\n", {"packing": True, "overlong": "split"}),
        ("stage: pt\npacking: false\n", {"packing": False, "overlong": "truncate"}),
        ("neat_packing: true\n", {"packing": True}),
        ("lora_rank: 32\n", {"alpha": 64.0}),
        ("lora_rank: 32\nlora_alpha: 8\n", {"alpha": 8.0}),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", {"warmup_ratio": 0.0, "schedule": "constant"}),
        ("warmup_steps: 0.1\n", {"warmup_ratio": 0.1}),
        ("warmup_steps: 20\nmax_steps: 200\n", {"warmup_ratio": 0.1}),
        ("warmup_steps: 0\nwarmup_ratio: 0.1\n", {"warmup_ratio": 0.1}),
        ("lr_scheduler_type: polynomial\n", {"schedule": "cosine"}),
    ],
)
def test_what_the_file_says_goes_before_what_is_assumed(tmp_path: Path, text: str, wanted: dict[str, object]) -> None:
    told, out = imported(tmp_path, f"model_name_or_path: acme/qwen\ndataset: mine\n{text}")
    job = load_job(out, ())
    assert job.model.lora is not None
    found = {"packing": job.packing, "overlong": job.overlong, "alpha": job.model.lora.alpha,
             "warmup_ratio": job.train.warmup_ratio, "schedule": job.train.schedule}  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert ("lr_scheduler_type" in told) == ("polynomial" in text)


@pytest.mark.parametrize("text, rules", [(AXOLOTL, axolotl), (LLAMA_FACTORY, llamafactory)])
def test_every_key_is_taken_or_told(tmp_path: Path, text: str, rules: object) -> None:
    told, _ = imported(tmp_path, text + "something_new: 3\n")
    assert told["something_new"] == "no counterpart is known"
    for key, value in yaml.safe_load(text).items():
        assert key in told or key in rules.RULES or value is False, key  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY])
def test_paths_are_those_of_the_working_directory(tmp_path: Path, text: str) -> None:
    for folder in ("examples", "jobs", "data", "acme/llama", "acme/qwen"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("rows.jsonl", "data/mine.json"):
        (tmp_path / file).write_text("")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    (tmp_path / "examples" / "theirs.yaml").write_text(text + "output_dir: ./out\n")
    import_job(Path("examples/theirs.yaml"), Path("jobs/job.yaml"))
    job = load_job("jobs/job.yaml", ())
    assert job.storage == str(tmp_path / "out") and Path(job.model.path).parent == tmp_path / "acme"
    assert {str(tmp_path / "rows.jsonl"), str(tmp_path / "data" / "mine.json")} & set(job.data.train_paths)


def test_a_data_set_that_is_not_taken_as_it_is_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "ranking": True, "num_samples": 10},
        "theirs": {"file_name": "theirs.json", "columns": {"messages": "talk"},
                   "tags": {"role_tag": "who", "content_tag": "value"}},
        "lost": {"script_url": "make.py"},
    }  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    told, _ = imported(tmp_path, LLAMA_FACTORY)
    for word in ("mine: not taken: num_samples, ranking", "theirs: not taken: tags", "lost: no file", "differently"):
        assert word in told["dataset"]
    (tmp_path / "job.yaml").unlink()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(
        {"mine": {"file_name": "mine.json", "columns": {"prompt": "body"}}}))  # fmt: skip
    imported(tmp_path, LLAMA_FACTORY.replace("stage: sft", "stage: pt").replace(",theirs,lost", ""))
    assert load_job(tmp_path / "job.yaml", ()).data.columns == {"text": "body"}


@pytest.mark.parametrize(
    "entry, word",
    [
        ({"split": "train[:20%]"}, "the whole split train is taken, not [:20%]"),
        ({"message_property_mappings": {"role": "who", "content": "value"}}, "not taken: message_property_mappings"),
        ({"message_property_mappings": {"role": "from", "content": "value"}, "roles": {"assistant": ["gpt"]}}, ""),
        ({"type": {"field_instruction": "q", "format": "[INST] {instruction}"}}, "type of its own is not known here"),
        ({"data_files": ["a.jsonl", "b.jsonl"]}, "of data_files a.jsonl alone is taken: name the others too"),
    ],
)
def test_what_axolotl_does_with_a_data_set_is_here_too_or_told(tmp_path: Path, entry: object, word: str) -> None:
    source = {"base_model": "a/b", "val_set_size": 0.1, "datasets": [{"path": "a/b", "type": "chat_template"} | entry]}  # type: ignore[operator]
    told, out = imported(tmp_path, yaml.safe_dump(source))
    assert told.get("datasets", "") == word and load_job(out, ()).task == "sft"


def test_the_command_prints_the_list_and_leaves_files_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    words = ["import", str(tmp_path / "theirs.yaml"), str(tmp_path / "mine.yaml")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "loss_watchdog_threshold: train.spike_factor" in done.stdout
    assert load_job(tmp_path / "mine.yaml", ()).name == "mine"
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, JobError) and "left as it is" in str(again.exception)
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(JobError, match="neither axolotl's"):
        import_job(tmp_path / "other.yaml", tmp_path / "x.yaml")
