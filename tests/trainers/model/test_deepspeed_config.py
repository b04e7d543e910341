"""ds_configs/ and what is derived from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainers.job.test_job import changed
from trainers.batching.batch_plan import plan_batches
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.model.deepspeed_config import derive_config, read_template

FOLDER = Path(__file__).parents[3] / "ds_configs"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.json"))


def job_with(template: str, **model: Any) -> Job:
    on_disk = {"offload_folder": "/fast"} if template == "zero3-nvme-offload" else {}
    return parse_job(changed(train={"deepspeed": template, **on_disk}, model={"path": "org/model", **model}))


def derive(job: Job) -> dict[str, Any]:
    return derive_config(job, plan_batches(job.train.global_batch_size, "auto", 1, 128))


def test_the_documented_templates_are_there() -> None:
    assert {"zero0", "zero1", "zero3", "zero3-cpu-offload", "zero3-nvme-offload", "zero2"} <= set(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeeds_own_config_class_accepts_each_template(template: str, dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(derive(job_with(template, dtype=dtype)))
    assert config.train_batch_size == 32
    assert config.zero_config.stage == read_template(template)["zero_optimization"]["stage"]
    assert config.bfloat16_config.enabled == (dtype == "bfloat16")
    assert config.gradient_clipping == 1.0


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_template_is_explained_in_the_readme(template: str) -> None:
    assert f"`{template}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_accelerate_configuration_is_one() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in FOLDER.glob("accelerate*.yaml"):
        config = load_config_from_file(str(path))
        assert config.distributed_type == "DEEPSPEED"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["num_processes"] == 2


def write(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def test_a_file_that_contradicts_the_job_is_refused_with_both_values(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "zero_optimization": {"stage": 3},
            "train_batch_size": 64,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": False},
            "optimizer": {"type": "Adam"},
        },
    )
    with pytest.raises(JobError) as caught:
        derive(job_with(path))
    found = "\n".join(caught.value.problems)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 4
    assert "train_batch_size = 64, the job 32" in found
    assert "gradient_clipping = 0.5, the job 1.0" in found
    assert "bf16.enabled = false, the job true" in found
    assert "sets 'optimizer', which belongs to the job" in found


def test_auto_and_agreeing_values_are_fine(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "zero_optimization": {"stage": 2},
            "train_batch_size": "auto",
            "gradient_clipping": 1.0,
            "fp16": {"enabled": False},
        },
    )
    assert derive(job_with(path))["train_batch_size"] == 32


@pytest.mark.parametrize(("stage", "parts", "summed"), [(1, 4, None), (2, 4, "fp32"), (3, 4, "fp32"), (3, 1, None)])
def test_bf16_gradients_of_several_micro_batches_are_summed_in_fp32(stage: int, parts: int, summed: str | None) -> None:
    config = derive_config(job_with(f"zero{stage}", dtype="bfloat16"), plan_batches(parts, 1, 1, 64))
    assert config.get("data_types", {}).get("grad_accum_dtype") == summed


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 4}}, {"zero_optimization": {}}])
def test_a_stage_that_is_none_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=r"must set zero_optimization\.stage to 0, 1, 2 or 3"):
        read_template(write(tmp_path, config))


@pytest.mark.parametrize(
    "option", [{"mics_shard_size": 2}, {"zero_quantized_weights": True}, {"zero_quantized_nontrainable_weights": True}]
)
def test_what_a_checkpoint_would_get_wrong_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3, **option}})
    with pytest.raises(JobError, match=rf"sets zero_optimization\.{next(iter(option))}, which .* checkpoints"):
        derive(job_with(path))
    off = {name: False if value is True else -1 for name, value in option.items()}
    derive(job_with(write(tmp_path, {"zero_optimization": {"stage": 3, **off}})))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(JobError, match="'zero4' is neither a file nor one of zero0, zero1, zero2, zero3"):
        read_template("zero4")


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(JobError, match="not valid JSON"):
        read_template(str(tmp_path / "bad.json"))
