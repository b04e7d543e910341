"""Doctor: a sound machine passes, and each unsound thing is named with its remedy."""

import json
import socket
import subprocess
import sys

import pytest

from orchestrator.commands.doctor import (
    GIB,
    cgroup_limit_bytes,
    check_cpu,
    check_gpus,
    check_hostname,
    check_interfaces,
    check_machine,
    check_memory,
    check_open_files,
    check_ray,
    check_shared_memory,
    check_storage,
    worst,
)


def test_this_machine_is_described_and_every_problem_has_a_remedy(tmp_path):
    checks = {check.name: check for check in check_machine(str(tmp_path), None)}
    assert {"python", "torch", "ray", "cpu", "cores", "memory", "storage", "gpus", "network"} <= set(checks)
    assert checks["torch"].value.startswith("2.")
    assert all(check.remedy for check in checks.values() if check.status != "ok")
    assert not [check for check in checks.values() if check.status == "fail"]
    assert json.loads(checks["cpu"].model_dump_json())["name"] == "cpu"


def test_no_heavy_library_is_imported():
    program = """
import sys
from orchestrator.commands.doctor import check_machine
check_machine()
heavy = {"torch", "ray", "transformers", "deepspeed", "mlflow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("flags", "level"), [("fpu avx2", "warn"), ("fpu avx512_bf16", "ok"), ("amx_bf16 amx_tile", "ok")]
)
def test_bf16_is_told_from_the_cpu_flags(tmp_path, flags, level):
    (tmp_path / "cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    check = check_cpu(tmp_path / "cpuinfo")
    assert (check.status, check.value.split(",")[0]) == (level, "Some CPU")


def test_the_containers_limit_counts_where_it_is_less(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    assert cgroup_limit_bytes(tmp_path) == 2 * GIB
    assert check_memory(64 * GIB, 60 * GIB, 2 * GIB).status == "warn"
    assert check_memory(64 * GIB, 60 * GIB, None).status == "ok"


def test_small_shared_memory_is_a_warning(tmp_path):
    assert check_shared_memory(tmp_path, 1 << 20).status == "ok"
    assert check_shared_memory(tmp_path / "absent", 1 << 20).status == "warn"


def test_storage_that_cannot_be_written_fails(tmp_path):
    assert check_storage(str(tmp_path / "new")).status in ("ok", "warn")
    (tmp_path / "file").write_text("in the way")
    check = check_storage(str(tmp_path / "file" / "runs"))
    assert check.status == "fail"
    assert "file" in check.value


def test_a_machine_without_a_driver_trains_on_cpu_and_a_broken_driver_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (check_gpus().status, "CPU" in check_gpus().value) == ("ok", True)
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho couldn\\'t communicate >&2\nexit 9\n")
    driver.chmod(0o755)
    assert check_gpus().status == "fail"
    assert "communicate" in check_gpus().value
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.0'\n")
    assert check_gpus().value == "1: NVIDIA H200, 143771 MiB, 580.0"


def test_several_interfaces_ask_for_the_one_to_use():
    two = {"eth0": "10.0.0.1", "eth1": "192.168.0.1"}
    assert check_interfaces({"eth0": "10.0.0.1"}, {}).status == "ok"
    assert "GLOO_SOCKET_IFNAME" in check_interfaces(two, {}).remedy
    assert check_interfaces(two, {"GLOO_SOCKET_IFNAME": "eth0"}).status == "ok"


def test_few_open_files_and_unknown_hostnames_are_warnings():
    assert check_open_files(1024).status == "warn"
    assert check_open_files(65536).status == "ok"
    assert check_hostname("no-such-host.invalid").status == "warn"
    assert check_hostname("localhost").status == "ok"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_address_is_knocked_at(form):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = form.format(listener.getsockname()[1])
        assert check_ray(address).status == "ok"
    closed = check_ray(address)
    assert closed.status == "fail"
    assert worst([closed, check_ray(None)]) == "fail"
    assert check_ray("http://[broken").status == "fail"
