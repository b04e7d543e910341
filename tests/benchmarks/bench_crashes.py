"""Hundreds of crashes and damages, ours beside DeepSpeed's save_checkpoint: how often the next start fails.

python tests/benchmarks/bench_crashes.py [--light 240] [--views 200] [--errors 100] [--engines 60] [--folder PLACE]

The next start fails where it raises, loads values that are not those of the step it names, or loads nothing although a
save had been reported as done. `light` injections drive the real buffers, writer processes, commits and readers without
an engine (ours only); `engines` ones two real ranks with a ZeRO-3 engine, the same injections for both. Every failure
is printed with its injection.

`views` are light ones too, over shared storage as several hosts see it (root and bindfs needed): each rank writes
through a mount of its own that remembers for 30 s what it saw or missed, is killed, and one to three ranks go on
through mounts drawn anew, and evaluate. `errors`: through a mount that fails at random with EIO, ESTALE or ENOSPC, in
saving and in resuming. A start that ends with an error of the storage is made again, at most three times.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.crashing import (
    Launched,
    check_values,
    damage_file,
    kill,
    loaded_by,
    next_start,
    small_disk,
    start_engines,
    start_light,
    wait_for_bytes,
)
from tests.mounts import failing_view, lagging_views
from tests.thread_ranks import ThreadRanks, run_threads
from trainers.checkpoint.choosing import choose_checkpoint
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import rank_file
from trainers.run.folder import step_name
from trainers.storage import Folder

VALUES = 500_000
SIZE = 12 * VALUES
DAMAGES = ("truncated", "flipped", "missing")
LIGHT = ("a rank", "a writer", "everything", "a full disk", *DAMAGES)
VIEWS = ("views lag; a rank", "views lag; everything", "views lag; a writer", "views lag; nobody")
ERRORS = ("errors; a rank", "errors; everything", "errors; nobody")
SHARED_VALUES = 20_000
RESTARTS = 3
ENGINES = ("rank 0", "rank 1", "everything", *DAMAGES)
ENGINE_BYTES = 12 * 4 * (384 * 384 + 384) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", type=int, default=240)
    parser.add_argument("--views", type=int, default=200)
    parser.add_argument("--errors", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=8, help="of `views`, which wait most of the time")
    parser.add_argument("--engines", type=int, default=60)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that, with the table so far")
    arguments = parser.parse_args()
    done: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    began = time.perf_counter()
    work = [("ours, light", LIGHT[number % len(LIGHT)], number) for number in range(arguments.light)]
    shared = [("ours, light", VIEWS[number % len(VIEWS)], number) for number in range(arguments.views)]
    shared += [("ours, light", ERRORS[number % len(ERRORS)], number) for number in range(arguments.errors)]
    for number in range(arguments.engines):
        work += [(saver, ENGINES[number % len(ENGINES)], number) for saver in ("ours", "deepspeed")]

    def inject(saver: str, injection: str, number: int) -> None:
        if time.perf_counter() - began > 60 * arguments.minutes:
            return
        dice = random.Random(f"{arguments.seed} {injection} {number}")
        with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as place:
            kind = engines if saver != "ours, light" else views if "; " in injection else light
            problem = kind(Path(place) / "job", saver, injection, dice)
        done[saver, injection] += 1
        if problem:
            failed[saver, injection] += 1
            print(f"FAILED {saver}, {injection}, number {number}: {problem}", flush=True)

    with ThreadPoolExecutor(arguments.parallel) as pool:
        list(pool.map(lambda item: inject(*item), shared))
    for item in work:
        inject(*item)
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


def views(folder: Path, _: str, injection: str, dice: random.Random) -> str | None:
    """One injection over shared storage that lags or fails."""
    folder.mkdir()
    if injection in VIEWS:
        with lagging_views(folder, 3) as mounts:
            return _views(folder, folder / "real", mounts, injection, dice, lambda _: None)
    (folder / "real").mkdir()
    with failing_view(folder, folder / "real") as (mount, control):
        return _views(folder, folder / "real", [mount], injection, dice, control.write_text)


def _views(
    folder: Path, real: Path, mounts: list[Path], injection: str, dice: random.Random, fail: Callable[[str], object]
) -> str | None:
    """Three launches, each killed or not, each on views drawn anew; what is wrong with a start after one."""
    fail("0.002 EIO ESTALE ENOSPC")
    told: list[Any] = []
    first = reported = 0
    for launch in range(2):
        for mount, step in itertools.product(mounts, range(first + 1, first + 4)):
            if dice.random() < 0.5:  # this host will remember that it is not there
                for name in ("COMMITTED", "manifest.json", rank_file(0, 2)):
                    os.path.exists(mount / step_name(step) / name)  # noqa: PTH110 - swallows what a mount raises
        sides = [dice.choice(mounts) for _ in range(2)]
        job = start_light(folder / f"launch-{launch}", sides, first + 3, SHARED_VALUES, first, keep=2)
        _strike(job, real, injection.partition("; ")[2], first, dice)
        reported = max([reported, *(one["step"] for one in job.said() if one["error"] is None)])
        fail("0.05 EIO ESTALE ENOSPC")
        ranks = [dice.choice(mounts) for _ in range(dice.randrange(1, 4))]
        for _ in range(1 + RESTARTS):
            results = run_threads(len(ranks), partial(_go_on, ranks, told))
            if not any(isinstance(result, OSError) for result in results):
                break
        if errors := [result for result in results if isinstance(result, Exception)]:
            return f"no start of {1 + RESTARTS} came through: {errors[0]}"
        if len(set(results)) > 1:
            return f"ranks went on from different steps: {results}"
        first = results[0]
        if first < reported:
            return f"went on from step {first}, step {reported} had been committed; told {told}"
        if first and _evaluate(dice.choice(mounts), first) != first:
            return f"an evaluation saw another step than {first}"
        fail("0.002 EIO ESTALE ENOSPC")
    aside = [path.name for path in real.glob("damaged-*")]
    return f"whole checkpoints were set aside: {aside}; told {told}" if aside else None


def _strike(job: Launched, real: Path, whom: str, first: int, dice: random.Random) -> None:
    """Kill somebody when a random part of a random step is written, or let the job end."""
    step, rank = first + dice.randrange(1, 4), dice.randrange(2)
    if whom != "nobody":
        alive = lambda: all(one.is_alive() for one in job.ranks)  # noqa: E731
        wait_for_bytes(real / step_name(step), rank_file(rank, 2), dice.randrange(12 * SHARED_VALUES), alive)
    if whom == "everything":
        for process in [*job.writers(), *(one.pid for one in job.ranks)]:
            kill(process)
    elif whom == "a rank":
        job.ranks[rank].kill()
    elif whom == "a writer" and job.writers():
        kill(dice.choice(job.writers()))
    if whom in ("nobody", "a writer"):
        job.join()
    job.kill()


def _go_on(mounts: list[Path], told: list[Any], rank: int, world: ThreadRanks) -> int:
    reader = choose_checkpoint(Folder(str(mounts[rank])), world, told.append)
    if reader is None:
        return 0
    check_values(reader, SHARED_VALUES)
    return int(reader.state.step)


def _evaluate(mount: Path, step: int) -> int:
    """What an export on another host reads."""
    files = LocalCopies(Folder(str(mount / step_name(step))))
    damage = find_damage(files)
    assert damage is None, damage
    reader = CheckpointReader(files)
    check_values(reader, SHARED_VALUES)
    return int(reader.state.step)


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
    for injection in dict.fromkeys([*LIGHT, *VIEWS, *ERRORS, *ENGINES]):
        cells = [f"{failed[s, injection]} of {done[s, injection]}" if done[s, injection] else "" for s in savers]
        print(f"| {injection} | {' | '.join(cells)} |")
    sums = [(sum(n for (s, _), n in failed.items() if s == one), sum(n for (s, _), n in done.items() if s == one))
            for one in savers]  # fmt: skip
    print(f"| all | {' | '.join(f'{bad} of {count}' for bad, count in sums)} |")


if __name__ == "__main__":
    main()
