"""Hundreds of crashes and damages, ours beside DeepSpeed's save_checkpoint: how often the next start fails.

python tests/benchmarks/bench_crashes.py [--light 240] [--engines 60] [--folder PLACE] [--seed 0]

The next start fails where it raises, loads values that are not those of the step it names, or loads nothing although a
save had been reported as done. `light` injections drive the real buffers, writer processes, commits and readers without
an engine (ours only); `engines` ones two real ranks with a ZeRO-3 engine, the same injections for both. Every failure
is printed with its injection.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.crashing import (
    damage_file,
    kill,
    loaded_by,
    next_start,
    small_disk,
    start_engines,
    start_light,
    wait_for_bytes,
)
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.records import rank_file
from trainers.run.folder import step_name
from trainers.storage import Folder

VALUES = 500_000
SIZE = 12 * VALUES
DAMAGES = ("truncated", "flipped", "missing")
LIGHT = ("a rank", "a writer", "everything", "a full disk", *DAMAGES)
ENGINES = ("rank 0", "rank 1", "everything", *DAMAGES)
ENGINE_BYTES = 12 * 4 * (384 * 384 + 384) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", type=int, default=240)
    parser.add_argument("--engines", type=int, default=60)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that, with the table so far")
    arguments = parser.parse_args()
    done: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    began = time.perf_counter()
    work = [("ours, light", LIGHT[number % len(LIGHT)], number) for number in range(arguments.light)]
    for number in range(arguments.engines):
        work += [(saver, ENGINES[number % len(ENGINES)], number) for saver in ("ours", "deepspeed")]
    for saver, injection, number in work:
        if time.perf_counter() - began > 60 * arguments.minutes:
            break
        dice = random.Random(f"{arguments.seed} {injection} {number}")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            one = light if saver == "ours, light" else engines
            problem = one(Path(place) / "job", saver, injection, dice)
        done[saver, injection] += 1
        if problem:
            failed[saver, injection] += 1
            print(f"FAILED {saver}, {injection}, number {number}: {problem}", flush=True)
    report(done, failed, time.perf_counter() - began)


def light(job_folder: Path, _: str, injection: str, dice: random.Random) -> str | None:
    """One injection without an engine; what is wrong with the next start."""
    job_folder.mkdir()
    if injection == "a full disk":
        with small_disk(job_folder / "disk", 7 * SIZE) as place:
            return _light(job_folder, place / "checkpoints", injection, dice)
    return _light(job_folder, job_folder / "checkpoints", injection, dice)


def _light(folder: Path, checkpoints: Path, injection: str, dice: random.Random) -> str | None:
    job = start_light(folder / "one", checkpoints, steps=3, values=VALUES)
    if injection not in DAMAGES:
        rank, offset, step = dice.randrange(2), dice.randrange(SIZE), dice.randrange(1, 4)
        alive = lambda: all(one.is_alive() for one in job.ranks)  # noqa: E731
        wait_for_bytes(checkpoints / step_name(step), rank_file(rank, 2), offset, alive)
    if injection == "a rank":
        dice.choice(job.ranks).kill()
        job.kill()
    elif injection == "everything":
        for process in [*job.writers(), *(rank.pid for rank in job.ranks)]:
            kill(process)
        job.kill()
    elif injection == "a writer":
        kill(dice.choice(job.writers()))
    elif injection == "a full disk":
        fill_up(checkpoints.parent / "other")
    survives = injection in ("a writer", "a full disk", *DAMAGES)
    if survives and job.join() != [0, 0]:
        return "the run did not go on"
    said = max((one["step"] for one in job.said() if one["error"] is None), default=0)
    if injection == "a writer" and said != 3:
        return f"a checkpoint was lost with its writer: {job.said()}"
    before = 0
    if injection in DAMAGES:
        before = said
        said = break_newest(checkpoints / step_name(said), injection, dice) - 1
    try:
        found = next_start(checkpoints, VALUES)
    except Exception as error:  # whatever it raises is the finding
        return f"{type(error).__name__}: {error}"
    if found.step < said:
        return f"loaded step {found.step}, step {said} was whole; told {found.told}"
    if before and found.step == before - 1 and not found.told:
        return "nothing was said of the damaged checkpoint"
    return None


def fill_up(path: Path) -> None:
    """Leave no room on a small disk."""
    with path.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 20))
        except OSError:
            return


def break_newest(folder: Path, how: str, dice: random.Random) -> int:
    """Damage one file of a checkpoint; the step of that checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    damage_file(dice.choice(files), how, dice)
    return int(folder.name[-8:])


def engines(folder: Path, saver: str, injection: str, dice: random.Random) -> str | None:
    """One injection with real ranks; what is wrong with the next start."""
    folder.mkdir()
    checkpoints, step = folder / "checkpoints", dice.randrange(2, 4)
    job = start_engines(folder, saver, steps=3)
    if injection in DAMAGES:
        if job.join() != [0, 0]:
            return "saving failed"
        break_newest(checkpoints / step_name(3), injection, dice)
        least = 2
    else:
        rank = int(injection[-1]) if injection.startswith("rank") else dice.randrange(2)
        name = rank_file(rank, 2) if saver == "ours" else f"pp_rank_{rank}_mp_rank_00_optim_states.pt"
        name = name if saver == "ours" else f"zero_{name}"
        wait_for_bytes(checkpoints / step_name(step), name, dice.randrange(ENGINE_BYTES), job.ranks[rank].is_alive)
        if injection == "everything":
            for process in (rank.pid for rank in job.ranks):
                kill(process)
        else:
            job.ranks[rank].kill()
        job.kill()
        least = max(committed_steps(Folder(str(checkpoints))), default=0) if saver == "ours" else step - 1
    found, problem = loaded_by(start_engines(folder, saver, steps=0, load=True))
    if problem:
        return problem
    return f"loaded step {found}, step {least} was whole" if found < least else None


def report(done: Counter[Any], failed: Counter[Any], seconds: float) -> None:
    """Failures out of injections, by saver and injection."""
    savers = ("ours, light", "ours", "deepspeed")
    print(f"\nthe next start failed, out of injections; {sum(done.values())} injections in {seconds:.0f} s\n")
    print("| injection | ours, light | ours, engine | save_checkpoint |\n| --- | ---: | ---: | ---: |")
    for injection in dict.fromkeys([*LIGHT, *ENGINES]):
        cells = [f"{failed[s, injection]} of {done[s, injection]}" if done[s, injection] else "" for s in savers]
        print(f"| {injection} | {' | '.join(cells)} |")
    sums = [(sum(n for (s, _), n in failed.items() if s == one), sum(n for (s, _), n in done.items() if s == one))
            for one in savers]  # fmt: skip
    print(f"| all | {' | '.join(f'{bad} of {count}' for bad, count in sums)} |")


if __name__ == "__main__":
    main()
