"""A model of a billion parameters, whole, on a small machine: made, planned, sharded, fully fine-tuned with ZeRO-3 by
two ranks, killed, resumed, evaluated, exported and registered, by `tuneyard plan` and `tuneyard run`.

python tests/benchmarks/bench_billion.py [--size 1b|100m] [--folder PLACE] [--steps 6] [--keep]

A Llama of random weights in bf16. Weights and optimizer state are on disk while it trains, so DeepSpeed's async I/O
must be buildable (libaio-dev). Memory is the sum of the proportional set sizes of all processes that the command
started, sampled twice a second; files that are mapped count as far as they are resident. Disk: about 55 bytes a
parameter. Needs no GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import make_chat_tokenizer
from tests.orchestrator.test_killed import MARK, marked_processes, wait_until_gone
from tests.tiny import chat_rows, make_llama, tiny_job
from tests.whole_run import environment, events_of, find_run, losses, result_of, runs_of, starts
from trainers.checkpoint.reading import committed_steps
from trainers.storage import Folder

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 18, "num_attention_heads": 16,
           "num_key_value_heads": 8},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
             "num_key_value_heads": 6},
}  # fmt: skip
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--folder", default=None, help="where there is room; by default the place for temporary files")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="billion-"))
    try:
        show(write_job(place, arguments.size, arguments.steps, arguments.length), arguments.steps)
    finally:
        if not arguments.keep:
            shutil.rmtree(place)


def write_job(folder: Path, size: str, steps: int, length: int) -> Path:
    """A model, its data, a DeepSpeed file with small buffers, and the job over them."""
    import torch
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = make_chat_tokenizer(folder / "tokenizer")
    make_llama(folder / "model", tokenizer, **SIZES[size])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "model", max_shard_size="500MB")
    print(f"model: {count:,} parameters, made in {time.perf_counter() - began:.0f} s", flush=True)
    del model
    zero = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3-nvme-offload.json").read_text())
    zero["zero_optimization"] |= {
        "sub_group_size": 25_000_000,
        "reduce_bucket_size": 20_000_000,
        "stage3_max_live_parameters": 50_000_000,
    }
    (folder / "zero3.json").write_text(json.dumps(zero))
    job = tiny_job(
        folder, folder / "model", "sft", chat_rows(40), data={"max_length": length},
        train={"global_batch_size": 2, "micro_batch_size": 1, "steps": steps, "learning_rate": 1e-5,
               "deepspeed": str(folder / "zero3.json"), "offload_folder": str(folder / "swap"), "verify": False},
        scale={"workers": 2}, checkpoint={"every_steps": steps // 2, "keep": 1}, name="billion",
        registry={"model": "billion"},
    )  # fmt: skip
    raw = job.model_dump(mode="json")
    raw["model"]["dtype"] = "bfloat16"
    (folder / "job.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "job.yaml"


def show(job_file: Path, steps: int) -> None:
    """Plan, run until half of the steps are committed, kill, run to the end; a line for each, and the figures."""
    on_cpus = ("--memory", "12GiB", "--set", "scale.gpus_per_worker=0")
    plan = json.loads(run_command("plan", str(job_file), "--json", *on_cpus).stdout)
    print(f"plan: {plan['parameters']:,} parameters, a rank {plan['ways'][0]['device_gib']:.2f} GiB, a checkpoint "
          f"{plan['checkpoint_gib']:.2f} GiB; disk {plan['disk_gib']:.1f} GiB", flush=True)  # fmt: skip
    first = Watched(job_file)
    first.until(lambda: half_is_committed(job_file, steps // 2))
    first.kill()
    print(f"killed the driver (SIGKILL) after step {steps // 2} was committed: {first.told()}", flush=True)
    second = Watched(job_file)
    code = second.finish()
    print(f"run again: exit code {code}, {second.told()}", flush=True)
    if code:
        print(second.output[-6000:])
        sys.exit(1)
    tell_run(find_run(job_file, "billion"))
    print(f"peak memory of all processes: {max(first.peak, second.peak) / GIB:.2f} GiB", flush=True)


def tell_run(run: Path) -> None:
    """What the run folder says."""
    steps = events_of(run, "step")
    print("losses:", ", ".join(f"{step} {loss:.4f}" for step, loss in sorted(losses(run).items())))
    print(f"launches began after steps {starts(run)}; a step took {min(step.step_s for step in steps):.0f} to "
          f"{max(step.step_s for step in steps):.0f} s; the largest rank {max(step.memory_gib for step in steps):.2f} "
          "GiB resident")  # fmt: skip
    for event in events_of(run, "checkpoint"):
        print(f"checkpoint of step {event.step}: {event.bytes / 1e9:.2f} GB written in {event.copy_s:.0f} s, the loop "
              f"waited {event.blocked_s:.0f} s")  # fmt: skip
    held = events_of(run, "start")[0].checkpoint_bytes
    print(f"host memory that saving held, of both ranks: {held:,} bytes")
    result = result_of(run)
    print(f"evaluated: best is {result['best']}")
    exports = list((run / "export").glob("*/*.safetensors"))
    print(f"exported: {sum(path.stat().st_size for path in exports) / 1e9:.2f} GB in {len(exports)} files")
    print(f"registered: {result['registry']}")


def half_is_committed(job_file: Path, step: int) -> bool:
    runs = runs_of(job_file, "billion")
    return bool(runs) and step in committed_steps(Folder(str(runs[0] / "checkpoints")))


def command(*words: str) -> list[str]:
    return [str(Path(sys.executable).parent / "tuneyard"), *words]


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=environment(), capture_output=True, text=True, check=True)


class Watched:
    """`tuneyard run` in a process of its own, and the memory that all it started takes."""

    def __init__(self, job_file: Path) -> None:
        self.peak, self.output, self._mark = 0, "", uuid.uuid4().hex
        self._began, self._over = time.perf_counter(), threading.Event()
        self._log = (job_file.parent / f"run-{self._mark[:6]}.log").open("w+")
        self.process = subprocess.Popen(
            command("run", str(job_file)), env=environment(**{MARK: self._mark}), stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._over.wait(0.5):
            self.peak = max(self.peak, sum(map(proportional_bytes, marked_processes(self._mark))))

    def until(self, reached: Any) -> None:
        """Wait; the command must still be at work then."""
        while not reached():
            if self.process.poll() is not None:
                self._end()
                raise SystemExit(f"it ended with {self.process.returncode}:\n{self.output[-6000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        wait_until_gone(lambda: [each for each in marked_processes(self._mark) if not is_guard(each)])
        self._end()

    def finish(self) -> int:
        code = self.process.wait()
        self._end()
        return code

    def _end(self) -> None:
        self._over.set()
        self._sampler.join()
        self._log.seek(0)
        self.output = self._log.read()

    def told(self) -> str:
        return f"{time.perf_counter() - self._began:.0f} s, peak of all processes {self.peak / GIB:.2f} GiB"


def is_guard(process: int) -> bool:
    """Whether a process only waits to clean up behind a killed driver."""
    try:
        return b"reaper.py" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def proportional_bytes(process: int) -> int:
    """Memory of a process, with its share of what others map too."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
