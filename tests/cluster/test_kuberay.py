"""The KubeRay manifests against the field names that KubeRay 1.6 publishes for ray.io/v1 (its CRD API reference).

Only the fields that we use are listed, and no others pass, so a misspelt one is found; which of them a site may
add is KubeRay's business.
"""

import copy
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from orchestrator.submitting.submit import connect, send
from tests.orchestrator.submitting.test_submit import job_of

CLUSTER = Path(__file__).parents[2] / "cluster"
STRING, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    properties = required | optional
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = record({"name": NAME})
CONTAINER = record(
    {"name": NAME, "image": {"type": "string", "pattern": r"^[^:]+:[^:]+$"}},
    securityContext=record(
        {"allowPrivilegeEscalation": {"const": False}, "capabilities": {"const": {"drop": ["ALL"]}}}
    ),
    env=many(record({"name": STRING, "value": {"type": "string"}})),
    ports=many(record({"name": NAME, "containerPort": COUNT})),
    lifecycle=record({"preStop": record({"exec": record({"command": many(STRING)})})}),
    resources=record({"requests": STRINGS, "limits": STRINGS}),
    volumeMounts=many(record({"name": NAME, "mountPath": STRING})),
)
VOLUME = record(
    {"name": NAME},
    persistentVolumeClaim=record({"claimName": NAME}),
    emptyDir=record({"medium": {"enum": ["Memory"]}, "sizeLimit": STRING}),
)
POD = record(
    {"containers": many(CONTAINER)},
    terminationGracePeriodSeconds=COUNT,
    securityContext=record({}, runAsNonRoot={"const": True}, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
    tolerations=many(record({"key": STRING, "operator": STRING, "effect": STRING})),
    volumes=many(VOLUME),
)
TEMPLATE = record({"spec": POD})
HEAD = record({"template": TEMPLATE, "rayStartParams": STRINGS})
WORKERS = record(
    {"groupName": NAME, "template": TEMPLATE, "minReplicas": COUNT, "maxReplicas": COUNT},
    replicas=COUNT,
    rayStartParams=STRINGS,
)
CLUSTER_SPEC = record(
    {"headGroupSpec": HEAD, "rayVersion": {"type": "string", "pattern": r"^2\.60\.\d+$"}},
    authOptions=record({"mode": {"enum": ["token", "disabled"]}}, secretName=NAME),
    workerGroupSpecs=many(WORKERS),
)
JOB_SPEC = record(
    {"entrypoint": STRING, "rayClusterSpec": CLUSTER_SPEC},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}
FILES = {"RayCluster": "kuberay-raycluster.yaml", "RayJob": "kuberay-rayjob.yaml"}


def manifest(kind: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / FILES[kind]).read_text())


def check(kind: str, document: dict[str, Any]) -> None:
    version = {"const": "ray.io/v1"}
    schema = record({"apiVersion": version, "kind": {"const": kind}, "metadata": METADATA, "spec": SPECS[kind]})
    jsonschema.validate(document, schema)


def cluster_spec(kind: str) -> dict[str, Any]:
    spec = manifest(kind)["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def pods(kind: str) -> list[dict[str, Any]]:
    spec = cluster_spec(kind)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}


@pytest.mark.parametrize("kind", FILES)
def test_manifest_has_the_published_fields_and_types(kind: str) -> None:
    check(kind, manifest(kind))


@pytest.mark.parametrize("kind", FILES)
def test_check_would_find_a_misspelt_field(kind: str) -> None:
    wrong = copy.deepcopy(manifest(kind))
    wrong["spec"]["backOffLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        check(kind, wrong)


def test_both_manifests_describe_the_same_cluster() -> None:
    assert cluster_spec("RayCluster") == cluster_spec("RayJob")


@pytest.mark.parametrize("kind", FILES)
def test_cluster_asks_for_the_token_of_a_secret_that_no_file_holds(kind: str) -> None:
    assert cluster_spec(kind)["authOptions"] == {"mode": "token", "secretName": "tuneyard-ray-token"}
    assert not any("kind: Secret" in path.read_text() for path in CLUSTER.glob("*.yaml"))


@pytest.mark.parametrize("kind", FILES)
def test_every_pod_is_non_root_and_shares_storage_and_memory(kind: str) -> None:
    claim = yaml.safe_load((CLUSTER / "kuberay-storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(kind):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/mnt/storage"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("kind", FILES)
def test_pods_live_longer_than_the_notice_to_the_trainers_and_that_longer_than_a_checkpoint(kind: str) -> None:
    checkpoint_grace_s = 30
    for pod in pods(kind):
        notice_s = float(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert checkpoint_grace_s < notice_s < pod["terminationGracePeriodSeconds"]
        assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= environment(pod).keys()
        assert environment(pod)["NCCL_SOCKET_IFNAME"].startswith("="), "else eth0 means eth01 too"


@pytest.mark.parametrize("kind", FILES)
def test_gpus_are_on_the_workers_alone_and_limits_equal_requests(kind: str) -> None:
    head, *workers = pods(kind)
    for pod in (head, *workers):
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert all(int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0 for pod in workers)


def test_job_is_rerun_by_the_same_command_and_cleaned_up() -> None:
    spec = manifest("RayJob")["spec"]
    assert spec["entrypoint"] == "tuneyard run /mnt/storage/job.yaml"
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("kind", FILES)
def test_end_of_the_head_waits_for_the_driver_to_commit(kind: str, tmp_path: Path) -> None:
    name = f"driver-{os.getpid()}"  # not the real one: other runs on this machine are none of our business
    driver = tmp_path / name
    driver.write_text(
        "#!/bin/bash\ntrap 'sleep 1; touch committed; exit 75' TERM\ntouch up; while :; do sleep 0.1; done\n"
    )
    driver.chmod(0o755)
    command = pods(kind)[0]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    running = subprocess.Popen([str(driver)], cwd=tmp_path)
    threading.Thread(target=running.wait, daemon=True).start()  # reaps it, as Ray's job supervisor does
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline, "the driver did not start"
            time.sleep(0.05)
        ours = [part.replace("-x tuneyard", f"-x {name}") for part in command]
        subprocess.run(ours, cwd=tmp_path, timeout=120, check=False, capture_output=True)
        assert (tmp_path / "committed").exists()
    finally:
        running.kill()


@pytest.mark.cluster
def test_end_of_the_head_reaches_a_driver_that_submit_started(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of `submit` is `python -m orchestrator`; the one here waits for a registry that never answers."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    client = connect(head)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert str(send.__defaults__).count("-m orchestrator ") == 1, "what it starts by default"
        submission = send(client, job_of(), f"-m orchestrator registry list --uri {uri}")
        driver = wait_for_driver(uri)
        command = pods("RayJob")[0]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        ours = [part.replace("-x tuneyard", f"-x tuneyard -s {os.getsid(driver.pid)}") for part in command]
        assert ours != command, "other drivers on this machine are none of our business"
        subprocess.run(ours, timeout=100, check=False, capture_output=True)
        assert not driver.is_running()
        deadline = time.monotonic() + 60
        while not client.get_job_status(submission).is_terminal():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def wait_for_driver(argument: str) -> psutil.Process:
    """The process called tuneyard with this argument, once there is one."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            comm = Path(f"/proc/{process.pid}/comm")
            if argument in (process.info["cmdline"] or ()) and comm.exists() and comm.read_text() == "tuneyard\n":
                return process
        time.sleep(0.2)
    raise AssertionError("submit started no process called tuneyard")
