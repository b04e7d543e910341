"""Doctor: a sound machine passes, and each unsound thing is named with its remedy."""

import json
import socket
import subprocess
import sys

import pytest

from orchestrator.commands.doctor import (
    GIB,
    REMEDIES,
    cgroup_limit_bytes,
    check_machine,
    probe_cpu,
    probe_gpus,
    probe_hostname,
    probe_interfaces,
    probe_memory,
    probe_open_files,
    probe_ray,
    probe_shared_memory,
    probe_storage,
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
    status, value = probe_cpu(tmp_path / "cpuinfo")
    assert (status, value.split(",")[0]) == (level, "Some CPU")


def test_the_containers_limit_counts_where_it_is_less(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    assert cgroup_limit_bytes(tmp_path) == 2 * GIB
    assert probe_memory(64 * GIB, 60 * GIB, 2 * GIB)[0] == "warn"
    assert probe_memory(64 * GIB, 60 * GIB, None)[0] == "ok"


def test_small_shared_memory_is_a_warning(tmp_path):
    assert probe_shared_memory(tmp_path, 1 << 20)[0] == "ok"
    assert probe_shared_memory(tmp_path / "absent", 1 << 20)[0] == "warn"


def test_storage_that_cannot_be_written_fails(tmp_path):
    assert probe_storage(str(tmp_path / "new"))[0] in ("ok", "warn")
    (tmp_path / "file").write_text("in the way")
    status, value = probe_storage(str(tmp_path / "file" / "runs"))
    assert status == "fail"
    assert "file" in value


def test_a_machine_without_a_driver_trains_on_cpu_and_a_broken_driver_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (probe_gpus()[0], "CPU" in probe_gpus()[1]) == ("ok", True)
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho couldn\\'t communicate >&2\nexit 9\n")
    driver.chmod(0o755)
    assert probe_gpus()[0] == "fail"
    assert "communicate" in probe_gpus()[1]
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.0'\n")
    assert probe_gpus()[1] == "1: NVIDIA H200, 143771 MiB, 580.0"


def test_gpus_that_torch_cannot_use_and_a_missing_compiler_are_told(tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.0'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that torch finds none, whatever the machine has
    checks = {check.name: check for check in check_machine()}
    assert checks["gpus"].status == "ok"
    assert checks["torch on gpus"].status == "fail" and "CUDA" in checks["torch on gpus"].value
    assert checks["compiler"].status == "warn" and "a C compiler" in checks["compiler"].value
    assert checks["torch on gpus"].remedy and checks["compiler"].remedy


def test_several_interfaces_ask_for_the_one_to_use():
    two = {"eth0": "10.0.0.1", "eth1": "192.168.0.1"}
    assert probe_interfaces({"eth0": "10.0.0.1"}, {})[0] == "ok"
    assert probe_interfaces(two, {})[0] == "warn"
    assert "GLOO_SOCKET_IFNAME" in REMEDIES["network"]
    assert probe_interfaces(two, {"GLOO_SOCKET_IFNAME": "eth0"})[0] == "ok"


def test_few_open_files_and_unknown_hostnames_are_warnings():
    assert probe_open_files(1024)[0] == "warn"
    assert probe_open_files(65536)[0] == "ok"
    assert probe_hostname("no-such-host.invalid")[0] == "warn"
    assert probe_hostname("localhost")[0] == "ok"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_address_is_knocked_at(form):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = form.format(listener.getsockname()[1])
        assert probe_ray(address)[0] == "ok"
    assert probe_ray(address)[0] == "fail"
    assert probe_ray(None)[0] == "ok"
    assert probe_ray("http://[broken")[0] == "fail"
