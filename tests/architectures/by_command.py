"""The matrix through `tuneyard run`: `make matrix`, or `python -m tests.architectures.by_command [FAMILY ...]`.

Each family is a job of its own with two ZeRO-3 workers, from data to registry, about half a minute each. With
`--product` before the families it is not the command that runs, but the whole product of tasks, ways, packing, ranks
with resume at the other size, and export, of which the tests run a covering part: about a minute a family.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.architectures.document import NAMES
from tests.architectures.families import FAMILIES, write_model
from tests.architectures.matrix import run_matrix
from tests.architectures.single import job_of, kind_of, tasks_of, tokenizers
from tests.architectures.trained import train_all
from tests.architectures.trials import DRAWING, every_trial
from trainers.model.fit import tested_families


def main() -> int:
    families = [word for word in sys.argv[1:] if word != "--product"] or list(FAMILIES)
    return run_product(tuple(families)) if "--product" in sys.argv else run_commands(families)


def run_product(families: tuple[str, ...]) -> int:
    """Every trial of some families; how many did not do as they should."""
    with tempfile.TemporaryDirectory() as scratch:
        matrix = run_matrix(Path(scratch), families)
        wrong = [cell for cell in matrix.cells if cell.failed or not (cell.loss_error or 0.0) <= 1e-5]
        outcomes = train_all(Path(scratch), matrix, every_trial(matrix.cells, families))
    off = [each for each in outcomes if each.trial.family not in DRAWING and not each.loss_error <= 1e-5]
    lost = [each for each in outcomes if each.error or each.keys or not each.logits_error <= 1e-5]
    for each in (*wrong, *off, *lost):
        print(each)
    print(f"{len(matrix.cells)} first losses and {len(outcomes)} trials, {len([*wrong, *off, *lost])} of them wrong")
    return len([*wrong, *off, *lost])


def run_commands(families: list[str]) -> int:
    """Each family's job; how many failed."""
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
    return len(failed)


if __name__ == "__main__":
    sys.exit(main() > 0)
