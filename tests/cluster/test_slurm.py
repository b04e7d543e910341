"""cluster/slurm.sbatch, run for real: Ray starts here; `srun`, `scontrol` and `tuneyard` are small stand-ins.

`srun` runs its command here once for each named node and passes SIGTERM on, as Slurm's does; `scontrol` expands the
node list and records requeueing; `tuneyard` records the cluster it was started in and ends as the test says.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
START_S = 250
"""Two nodes of Ray start in 15 s, and in some minutes on a busy machine."""

SRUN = """#!/bin/bash
echo "srun $*" >> "$TEST_RECORD/srun"
while [[ $1 == --* ]]; do
    if [[ $1 == --nodelist=* ]]; then IFS=, read -ra nodes <<< "${1#--nodelist=}"; fi
    shift
done
[[ -e $TEST_RECORD/lose-nodes ]] && exec sleep 600
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
for node in "${nodes[@]}"; do
    SLURMD_NODENAME=$node SLURM_CPUS_ON_NODE=1 "$@" &
    pids+=($!)
done
while kill -0 "${pids[@]}" 2>/dev/null; do wait; done
"""

SCONTROL = """#!/bin/bash
echo "$*" >> "$TEST_RECORD/scontrol"
if [[ $1 == show ]]; then tr , '\\n' <<< "$3"; fi
"""

RAY = """#!/bin/bash
if [[ -e $TEST_RECORD/lose-ray && ! -e $TEST_RECORD/refused ]]; then touch "$TEST_RECORD/refused"; exit 1; fi
exec {ray} "$@"
"""

TUNEYARD = """#!/bin/bash
stopped() { touch "$TEST_RECORD/checkpoint"; exit 75; }
trap stopped TERM
echo "$*" > "$TEST_RECORD/arguments"
if [[ -e $TEST_RECORD/ask-ray ]]; then
    for _ in {1..100}; do  # what it shows lags behind the nodes by some seconds
        ray status > "$TEST_RECORD/status"
        [[ $(grep -c " 1 node_" "$TEST_RECORD/status") == 2 ]] && break
    done
    python - > "$TEST_RECORD/interfaces" 2> /dev/null <<'PYTHON'
import os, ray
ray.init(log_to_driver=False)
names = lambda: (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(names)
for _ in range(2): print(*ray.get(task.remote()))
PYTHON
fi
touch "$TEST_RECORD/running"
if [[ -e $TEST_RECORD/lose-ray ]]; then
    python - 2> /dev/null <<'PYTHON'
import os, ray, time
ray.init(log_to_driver=False)
while sorted(node["Alive"] for node in ray.nodes()) != [False, True, True]: time.sleep(0.2)
PYTHON
fi
if [[ -e $TEST_RECORD/run-long ]]; then for _ in {1..600}; do sleep 0.1; done; fi
exit "$(cat "$TEST_RECORD/exit-status")"
"""


class Allocation:
    """One start of the script in a private folder, with a private Ray."""

    def __init__(self, folder: Path, ray_tmp: str, job_id: int) -> None:
        self.record = folder / "record"
        self.ray_tmp = ray_tmp
        self.job_id = job_id
        self.bin = folder / "bin"
        for path in (self.record, self.bin):
            path.mkdir()
        ray = RAY.format(ray=Path(sys.executable).parent / "ray")
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("tuneyard", TUNEYARD), ("ray", ray)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, *arguments: str, nodes: str, exit_status: int = 0, flags: tuple[str, ...] = ()) -> None:
        (self.record / "exit-status").write_text(str(exit_status))
        for flag in flags:
            (self.record / flag).touch()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM", "TUNEYARD_"))}
        environment = clean | {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TEST_RECORD": str(self.record),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_CPUS_ON_NODE": "1",
            "TUNEYARD_VENV": str(self.record / "none"),
            "TUNEYARD_INTERFACE": "lo",
            "TUNEYARD_RAY_TMP": self.ray_tmp,
            "TUNEYARD_JOIN_TIMEOUT_S": "1" if "lose-nodes" in flags else str(START_S),
        }
        self.log = (self.record / "log").open("w")
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while not (self.record / name).exists():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def ends(self) -> int:
        try:
            return self.process.wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            pytest.fail(self.output())

    def output(self) -> str:
        return self.read("log")

    def read(self, name: str) -> str:
        path = self.record / name
        return path.read_text() if path.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """Every process that has this allocation's Ray folder or its stand-ins on its command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if self.ray_tmp in line or str(self.bin) in line:
                found.append(process)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            process.kill()
        self.log.close()


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    short = tempfile.mkdtemp(prefix="ty")  # Ray's sockets live below it and may have 107 characters
    made = Allocation(tmp_path, f"{short}/r", job_id=os.getpid() % 4000 + 4000)
    yield made
    made.close()
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.cluster
def test_job_runs_on_a_cluster_of_all_nodes_though_ray_fails_and_its_status_is_the_scripts(
    allocation: Allocation,
) -> None:
    """The first start of the head ends at once. While the job runs, the Ray of the other node is killed."""
    flags, words = ("ask-ray", "lose-ray"), ("job.yaml", "--set", "train.steps=3")
    allocation.start(*words, nodes="node-a,node-b", exit_status=5, flags=flags)
    allocation.wait_for("running")
    (lost,) = [each for each in allocation.processes() if each.name() == "raylet" and "r-node-b" in str(each.cmdline())]
    lost.kill()
    assert allocation.ends() == 5, allocation.output()
    assert "did not start on the first node; it is started once more" in allocation.output()
    assert "Ray ended on node-b with status 1; it is started again" in allocation.output()
    assert allocation.read("arguments").split() == ["run", *words]
    assert allocation.read("status").count(" 1 node_") == 2, allocation.read("status")
    assert allocation.read("interfaces").split() == ["lo", "=lo"] * 2
    assert "--nodelist=node-b" in allocation.read("srun")
    assert "requeue" not in allocation.read("scontrol")
    assert allocation.processes() == []


@pytest.mark.cluster
@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_notice_lets_the_job_commit_and_requeues_unless_it_was_cancelled(
    allocation: Allocation, sent: signal.Signals, requeued: bool
) -> None:
    allocation.start("job.yaml", nodes="node-a", flags=("run-long",))
    allocation.wait_for("running")
    allocation.process.send_signal(sent)
    assert allocation.ends() == 75, allocation.output()
    assert (allocation.record / "checkpoint").exists()
    assert (f"requeue {allocation.job_id}" in allocation.read("scontrol")) == requeued
    assert allocation.processes() == []


@pytest.mark.cluster
def test_node_that_never_joins_is_reported_before_the_job_starts(allocation: Allocation) -> None:
    allocation.start("job.yaml", nodes="node-a,node-b", flags=("lose-nodes",))
    assert allocation.ends() == 3
    assert "1 of 2 nodes joined Ray within 1 s" in allocation.output()
    assert not (allocation.record / "running").exists()
    assert allocation.processes() == []


def probe_network(*arguments: str) -> subprocess.CompletedProcess[str]:
    text = SCRIPT.read_text()
    function = text[text.index("probe_network() {") : text.index("# Becomes Ray")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", f'{function}\nprobe_network "$@"', "bash", *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)


def test_interface_is_the_one_that_leads_to_the_peer_unless_it_is_named() -> None:
    assert probe_network("", "127.0.0.1").stdout.split() == ["127.0.0.1", "lo"]
    assert probe_network("lo", "10.0.0.1").stdout.split() == ["127.0.0.1", "lo"]


def test_missing_interface_is_named_with_those_that_exist() -> None:
    ran = probe_network("ib7", "127.0.0.1")
    assert ran.returncode != 0
    assert "interface ib7 has no IPv4 address" in ran.stderr
    assert "lo" in ran.stderr.rsplit(":", 1)[1]


def test_script_is_clean_under_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    ran = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
