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
        for variable in ("RAY_AUTH_MODE=token", "GLOO_SOCKET_IFNAME=", "NCCL_SOCKET_IFNAME="):
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
