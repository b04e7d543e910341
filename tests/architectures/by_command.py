"""The matrix through `tuneyard run`: `make matrix`, or `python -m tests.architectures.by_command [FAMILY ...]`.

Each family is a job of its own with two ZeRO-3 workers, from data to registry, about half a minute each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.architectures.document import NAMES
from tests.architectures.families import FAMILIES, write_model
from tests.architectures.single import job_of, kind_of, tasks_of, tokenizers
from trainers.model.fit import tested_families


def main() -> int:
    families = sys.argv[1:] or list(FAMILIES)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        words = tokenizers(Path(scratch) / "words")
        for family in families:
            place = Path(scratch) / family
            write_model(family, place / "model", words[kind_of(family)])
            tasks = [task for task in tasks_of(family) if NAMES.get(task, task) in tested_families()[family]]
            task = tasks[list(FAMILIES).index(family) % len(tasks)]
            job = job_of(task, place, place / "model")
            settings = json.loads(job.model_dump_json(exclude_unset=True))
            settings["data"].pop("packing", None)
            settings |= {"name": family.replace("_", "-"), "scale": {"workers": 2}}
            settings["train"] |= {"deepspeed": "zero3", "global_batch_size": 4, "steps": 4}
            (place / "job.yaml").write_text(yaml.safe_dump(settings))
            command = [sys.executable, "-m", "orchestrator", "run", str(place / "job.yaml")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(f"{family:24} {task:12} exit {done.returncode}", flush=True)
            if done.returncode:
                failed.append(family)
                print(done.stderr[-1500:], flush=True)
    print(f"{len(families) - len(failed)} of {len(families)} families, {len(failed)} failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
