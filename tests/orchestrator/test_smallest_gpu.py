"""The memory of a cluster's GPUs is what its nodes say, not what the driver's machine has."""

import os
import subprocess
import sys
from pathlib import Path

TOOL = "#!/bin/sh\nprintf '81559\\n4096\\n'\n"
PROGRAM = """
import os, sys
import ray
from orchestrator.ray_session import gpu_memory, smallest_gpu
ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
os.environ["PATH"] = "/nowhere"
print("told", gpu_memory(), smallest_gpu(ray))
ray.shutdown()
"""


def test_the_smallest_gpu_is_the_one_that_nodes_tell_of(tmp_path: Path) -> None:
    """Ray's processes keep the PATH with the tool; the driver loses it."""
    (tmp_path / "nvidia-smi").write_text(TOOL)
    (tmp_path / "nvidia-smi").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert f"told None {4096 * 2**20}" in said.stdout, said.stderr[-2000:]
