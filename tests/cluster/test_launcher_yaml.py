"""The Ray launcher files, through Ray's own preparation and schema."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted(CLUSTER.glob("ray-cluster*.yaml"))


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def commands(config: dict[str, Any]) -> dict[str, list[str]]:
    return {key: value for key, value in config.items() if key.endswith("_commands")}


def test_both_sites_are_there() -> None:
    assert [load(path)["provider"]["type"] for path in FILES] == ["aws", "local"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rays_launcher_accepts_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(path))
    validate_config(prepared)
    types = prepared["available_node_types"].values()
    assert sum(node["min_workers"] for node in types) == prepared["max_workers"] > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rays_launcher_would_refuse_a_misspelt_key(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = copy.deepcopy(load(path)) | {"head_start_commands": []}
    with pytest.raises(jsonschema.ValidationError, match="head_start_commands"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_ray_start_has_token_and_interfaces_in_its_environment(path: Path) -> None:
    config = load(path)
    for kind in ("head", "worker"):
        starts = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 1
        environment = starts[0].split("ray start")[0]
        for variable in ("RAY_AUTH_MODE=token", "GLOO_SOCKET_IFNAME=", "NCCL_SOCKET_IFNAME='="):
            assert variable in environment
    assert any(remote.endswith("/.ray/auth_token") for remote in config["file_mounts"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shared_storage_is_checked_or_mounted_before_ray_starts(path: Path) -> None:
    assert any("mountpoint -q /mnt/storage" in line for line in load(path)["initialization_commands"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_is_valid_shell(path: Path) -> None:
    for key, lines in commands(load(path)).items():
        for line in lines:
            checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{key}: {line}: {checked.stderr}"


def test_gpu_nodes_on_aws_ask_for_an_efa_interface_on_each_network_card() -> None:
    from ray.autoscaler._private.aws.config import _configure_from_network_interfaces

    config = load(CLUSTER / "ray-cluster-aws.yaml")
    prepared = _configure_from_network_interfaces(config)["available_node_types"]["gpu"]["node_config"]
    gpu, head = (config["available_node_types"][kind]["node_config"] for kind in ("gpu", "head"))
    assert gpu["InstanceType"] == "p4d.24xlarge", "it has four network cards; others have other numbers"
    places = [(one["NetworkCardIndex"], one["DeviceIndex"], one["InterfaceType"]) for one in gpu["NetworkInterfaces"]]
    assert places == [(0, 0, "efa"), *((card, 1, "efa-only") for card in (1, 2, 3))]
    assert set(prepared["SecurityGroupIds"]) == set(head["SecurityGroupIds"])
    assert set(prepared["SubnetIds"]) == set(head["SubnetIds"])


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_what_aws_is_asked_for_are_parameters_of_run_instances(kind: str) -> None:
    import boto3
    from botocore.validate import ParamValidator

    ec2 = boto3.client("ec2", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    shape = ec2.meta.service_model.operation_model("RunInstances").input_shape
    wanted = load(CLUSTER / "ray-cluster-aws.yaml")["available_node_types"][kind]["node_config"]
    wanted.pop("SubnetIds", None)  # Ray's own: it takes one of them

    def problems(parameters: dict[str, Any]) -> str:
        return ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **parameters}, shape).generate_report()

    assert problems(wanted) == ""
    assert "InstanceTyp" in problems({**wanted, "InstanceTyp": "m6i.xlarge"})
