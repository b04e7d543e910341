"""Plans for devices that are not here: from a configuration alone, with a verdict and what to change."""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.planning.hardware import GPUS, cluster_settings, device_bytes
from orchestrator.planning.plan import plan_job
from orchestrator.planning.preflight import check_job
from tests.architectures.single import Samples, job_of
from tests.tiny import chat_rows, checked, film_rows, make_bert, shard_locally, tiny_job, write_rows
from trainers.errors import JobError
from trainers.run.events import StepEvent
from trainers.run.log import RunLog
from trainers.storage import Folder


def test_devices_are_named_or_given_in_bytes() -> None:
    assert device_bytes(None, None) is None
    assert device_bytes("H100-80", None) == GPUS["h100-80"] * 2**20
    asked = {amount: device_bytes(None, amount) for amount in ("80", "80GiB", "80 gib", "80GB", "512MiB", "1.5")}
    gib = 2**30
    assert list(asked.values()) == [80 * gib, 80 * gib, 80 * gib, 80 * 10**9, gib // 2, 3 * gib // 2]


@pytest.mark.parametrize(
    ("gpu", "memory", "words"),
    [("h100", None, "known are .*h100-80"), (None, "80 bananas", "80GiB"), (None, "x", "80GiB"), ("l4-24", "9", "one")],
)
def test_what_is_not_understood_is_refused_with_what_would_be(gpu: str, memory: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        device_bytes(gpu, memory)


def test_nodes_set_a_worker_for_each_gpu() -> None:
    assert cluster_settings(None, None, None, 8) == []
    assert cluster_settings("h100-80", None, None, 8) == ["scale.gpus_per_worker=1"]
    assert cluster_settings(None, None, 4, 2) == ["scale.workers=8", "scale.gpus_per_worker=1"]


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return Samples(tmp_path / "samples", "own")


@pytest.fixture
def big(tmp_path: Path, tiny_chat_tokenizer: Path) -> Path:
    """A job for a Llama of 1.2 billion parameters, of which there is the configuration alone."""
    model = tmp_path / "model"
    LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, max_position_embeddings=4096,
    ).save_pretrained(model)  # fmt: skip
    for file in tiny_chat_tokenizer.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    write_rows(tmp_path / "chats.jsonl", chat_rows(50))
    job = {
        "name": "big", "task": "sft", "model": {"path": str(model), "dtype": "bfloat16"},
        "storage": str(tmp_path / "s"),
        "data": {"train": [str(tmp_path / "chats.jsonl")], "eval_fraction": 0.2, "max_length": 2048, "packing": True},
        "train": {"global_batch_size": 32, "steps": 100, "learning_rate": 1e-5},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path / "job.yaml"


def plan(job: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["plan", str(job), "--json", *options])
    return getattr(done.exception, "exit_code", 0), json.loads(done.stdout)


def test_a_plan_needs_no_weights_and_tells_memory_time_and_cost(big: Path) -> None:
    code, told = plan(big, "--gpu", "h100-80", "--nodes", "1", "--throughput", "2000", "--price", "3")
    assert (code, told["fits"], told["world_size"], told["remedy"]) == (0, True, 8, [])
    assert told["parameters"] == pytest.approx(1.498e9, rel=1e-3)  # the head's and the embeddings' are apart
    for way in told["ways"]:
        parts = sum(way[name] for name in ("weights", "gradients", "optimizer", "activations", "logits", "working"))
        assert way["margin"] == pytest.approx(0.08 * parts + 1.5, rel=1e-6)
        assert way["device_gib"] == pytest.approx(parts + way["margin"], rel=1e-6)
        copies = 0.0 if "offload" in way["way"] else 12 * told["parameters"] / 8 / 2**30
        assert way["staging"] == pytest.approx(copies)
    trained = told["train_tokens"] * told["steps"] * 32 / told["sequences"]
    assert told["hours"] == pytest.approx(trained / (2000 * 8) / 3600)
    assert told["cost"] == pytest.approx(told["hours"] * 8 * 3)
    assert told["flops"] == pytest.approx(trained * (6 * told["parameters"] + 6 * 16 * 2048 * 2048))
    assert any("holds no weights" in note for note in told["notes"])


def test_a_plan_tells_what_workers_send_and_the_settings_that_follow_from_the_model(big: Path) -> None:
    asked = ["--gpu", "h100-80", "--nodes", "1", "--set", "train.micro_batch_size=2"]
    sent = {}
    for way in ("zero0", "zero1", "zero2", "zero3"):
        _, told = plan(big, *asked, "--set", f"train.deepspeed={way}")
        sent[way] = told["sent_gib_per_step"] * 2**30 / (2 * told["parameters"] * 7 / 8)
    assert sent == pytest.approx({"zero0": 4, "zero1": 2, "zero2": 3, "zero3": 6}), "gradients of stage 0 are in fp32"
    assert {name for name, _, reason in told["settings"] if reason} >= {"reduce_bucket_size"}
    shown = CliRunner().invoke(app, ["plan", str(big), "--full", *asked, "--set", "train.deepspeed=zero3"])
    assert "stage3_prefetch_bucket_size" in shown.stdout


def test_people_read_what_a_worker_takes_of_gpu_and_host_and_how_long_it_lasts(big: Path) -> None:
    asked = ["--memory", "80GiB", "--throughput", "4000", "--price", "2", "--set", "train.deepspeed=zero3-cpu-offload"]
    shown = CliRunner().invoke(app, ["plan", str(big), *asked], env={"COLUMNS": "80"}).stdout
    (way,) = (way for way in plan(big, *asked)[1]["ways"] if way["way"] == "zero3-cpu-offload")
    assert f"{way['device_gib']:.1f} GiB of a worker's GPU" in shown
    assert f"{way['host_gib'] + way['staging']:.1f} GiB a worker for state" in shown and way["host_gib"] > 0
    assert "cpu-offload" in shown and "hours" not in shown and ", costs " in shown
    refused = CliRunner().invoke(app, ["plan", str(big), "--memory", "80GiB", "--price", "2"])
    assert isinstance(refused.exception, JobError) and "--throughput" in str(refused.exception)


def test_what_does_not_fit_ends_with_the_smallest_change_that_does(big: Path) -> None:
    asked = ["--memory", "20GiB", "--set", "train.deepspeed=zero1", "--set", "train.activation_checkpointing=none"]
    code, told = plan(big, *asked)
    assert (code, told["fits"]) == (3, False)
    assert told["remedy"] and not any(each.startswith("scale.workers") for each in told["remedy"])
    code, mended = plan(big, *asked, *(part for each in told["remedy"] for part in ("--set", each)))
    assert (code, mended["fits"]) == (0, True)


def test_more_workers_are_the_remedy_where_no_setting_helps(big: Path) -> None:
    plain = CliRunner().invoke(app, ["plan", str(big), "--memory", "8GiB", "--set", "train.deepspeed=zero3"])
    assert getattr(plain.exception, "exit_code", 0) == 3
    words = " ".join(re.sub(r"[│┃]", " ", plain.stdout).split())
    assert "does not fit" in words
    code, told = plan(big, "--memory", "2GiB")
    assert (code, told["remedy"]) == (3, [])


def test_what_a_run_has_shown_is_the_speed_of_its_own_devices_alone(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(40))
    shard_locally(job)
    ready = checked(job)
    run = plan_job(ready).run
    assert run is not None and plan_job(ready).hours is None
    with closing(RunLog(Folder(run))) as log:
        log.append(StepEvent(step=1, loss=1.0, tokens_per_s=50.0))
    plan = plan_job(ready)
    trained = plan.train_tokens * plan.steps * plan.global_batch_size / plan.sequences
    assert plan.hours == pytest.approx(trained / 50 / 3600)
    assert plan_job(ready, device_bytes=80 * 2**30).hours is None


def test_ranks_on_cpus_are_held_against_the_memory_that_each_may_take(big: Path) -> None:
    asked = ["--set", "scale.gpus_per_worker=0", "--set", "scale.workers=2", "--set", "train.deepspeed=zero2"]
    code, told = plan(big, "--memory", "60GiB", *asked)
    assert (code, told["fits"], told["on_cpu"], told["deepspeed"]) == (0, True, True, "zero2")
    chosen = next(way for way in told["ways"] if way["way"] == "zero2")
    assert chosen["device_gib"] > chosen["staging"] + 20  # copies for checkpoints lie in the same memory
    assert plan(big, "--memory", f"{chosen['device_gib'] - 1:.2f}GiB", *asked)[0] == 3


def test_a_sequence_too_long_for_one_device_is_planned_over_several(big: Path) -> None:
    """The advice is taken as it comes, and fits."""
    long = [
        "--gpu",
        "h100-80",
        "--nodes",
        "1",
        "--set",
        "data.max_length=1600000",
        "--set",
        "train.global_batch_size=8",
    ]
    code, told = plan(big, *long)
    advice = [f"--set={each}" for each in told["remedy"]]
    assert code == 3 and not told["fits"] and "train.sequence_parallel=2" in told["remedy"]
    code, shared = plan(big, *long, *advice)
    assert code == 0 and shared["fits"] and (shared["sequence_parallel"], shared["world_size"]) == (2, 8)
    assert (shared["global_batch_size"], shared["micro_batch_size"], shared["accumulation"]) == (8, 1, 2)
    shown = CliRunner().invoke(app, ["plan", str(big), *long, *advice], env={"COLUMNS": "200"}).stdout
    assert "8 sequences = 4 groups of 2 workers that share each sequence x 1 sequences x 2 accumulated" in shown


def test_what_workers_that_share_sequences_exchange_is_among_what_they_send(big: Path) -> None:
    """Queries, keys, values and outputs of each layer: forward, backward, and forward again."""
    asked = ["--gpu", "h100-80", "--nodes", "1", "--set", "train.deepspeed=zero0", "--set", "train.global_batch_size=8",
             "--set", "train.activation_checkpointing=full", "--set", "train.micro_batch_size=1"]  # fmt: skip
    alone, shared = (plan(big, *asked, "--set", f"train.sequence_parallel={ranks}")[1] for ranks in (1, 4))
    values = 2 * (32 * 64 + 8 * 64)
    exchanged = 3 * 16 * values * 512 * 2 * 4 * (3 / 4)  # passes, layers, values, positions, bytes, accumulated
    more = (shared["sent_gib_per_step"] - alone["sent_gib_per_step"]) * 2**30
    assert more == pytest.approx(exchanged)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.sequence_parallel=3", "scale.workers=3"], r"its 32 attention heads do not divide by 3.*\[1, 2, 4, 8"),
        (["train.sequence_parallel=2", "scale.workers=3"], r"scale\.workers \(3\) must be a multiple"),
        (["train.sequence_parallel=2", "data.packing=false"], r"needs data\.packing"),
        (["train.sequence_parallel=2", "train.neftune_alpha=5"], r"train\.neftune_alpha: not with train\.sequence_par"),
        (["train.sequence_parallel=2", "train.compile=true"], r"train\.compile: not with train\.sequence_parallel"),
        (
            ["train.sequence_parallel=2", "model.attention=sdpa", "scale.workers=2"],
            r"model\.attention documents.* sdpa",
        ),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused_with_the_reason(
    big: Path, settings: list[str], problem: str
) -> None:
    flags = [part for each in settings for part in ("--set", each)]
    done = CliRunner().invoke(app, ["plan", str(big), *flags, "--set", "train.global_batch_size=12"])
    assert isinstance(done.exception, JobError) and re.search(problem, str(done.exception)), done.exception


def test_tiles_of_layers_that_a_model_has_not_are_refused_before_anything_starts(
    tmp_path: Path, samples: Samples
) -> None:
    job = job_of("classify", tmp_path, samples.model("mixtral"))
    asked = job.model_copy(update={"train": job.train.model_copy(update={"feed_forward_tiles": True})})
    assert check_job(job)
    with pytest.raises(JobError, match=r"train\.feed_forward_tiles: no feed-forward layers were found in Mixtral"):
        check_job(asked)
