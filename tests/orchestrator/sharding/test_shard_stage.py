"""What the data stage survives and leaves out: killed workers, a fast tokenizer caught out, repeats, rows of the
evaluation set; and what it holds while it works.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.sharding import stage
from orchestrator.sharding.stage import write_shards
from tests.orchestrator.sharding.test_shards import content, plain_job, stamps
from tests.tiny import chat_rows, checked, load_written
from tests.tiny import write_rows as write
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.run.record import job_task
from trainers.shards.contamination import contamination_name
from trainers.shards.dataset import ShardSet
from trainers.shards.ledger import ledger_lines
from trainers.shards.manifest import Shards, shards_folder
from trainers.sources import readers
from trainers.storage import Folder

pytestmark = pytest.mark.usefixtures("ray_session")
TEXTS = ["the film is good", "a film is not good", "the plot is bad and the acting is not", "an assistant of the user"]


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{TEXTS[i % 4]} {i} {'the plot ' * (i % 7)}"} for i in range(start, start + count)]


def text_job(tmp_path: Path, model: Path, storage: str = "storage", **data: Any) -> Job:
    plain = plain_job(tmp_path, model, storage, **{"max_length": 64, **data})
    return parse_job({**plain, "task": "pretrain"})


def open_train(job: Job, shards: Shards) -> ShardSet:
    folder = shards_folder(Folder(job.storage), shards.train.key)
    return ShardSet(folder, shards.train, job_task(job, shards.train))


@pytest.mark.cluster
def test_killed_workers_cost_the_shards_in_flight_alone(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", texts(200_000))
    other = write(tmp_path / "e.jsonl", texts(3, 90_000))
    monkeypatch.setattr(readers, "UNIT_BYTES", 100_000)
    clean = text_job(tmp_path, tiny_chat_tokenizer, "clean", train=[str(path)], eval=[str(other)])
    write_shards(checked(clean, tiny_chat_tokenizer))
    job = text_job(tmp_path, tiny_chat_tokenizer, "killed", train=[str(path)], eval=[str(other)])
    killed: list[int] = []
    written: dict[str, int] = {}

    def kill() -> None:
        deadline = time.monotonic() + 400
        while len(list(Path(job.storage).glob("shards/*/shard-*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        written.update({name: stamp for name, stamp in stamps(job).items() if name.endswith(".json")})
        while not killed and time.monotonic() < deadline:
            for pid in workers():
                with suppress(ProcessLookupError):  # it ended since it was listed
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill)
        shards = write_shards(checked(job, tiny_chat_tokenizer))
    killing.result()
    assert killed and len(shards.train.shards) > 15
    done = {name: stamp for name, stamp in written.items() if "shard-" in name}
    assert len(done) >= 3 and {name: stamps(job)[name] for name in done} == done
    whole = {name: data for name, data in content(job).items() if "/.tmp-" not in name}
    assert whole == content(clean)


def workers() -> list[int]:
    """Processes below this one that are running one of our Ray tasks right now."""
    import psutil

    def busy(process: Any) -> bool:
        try:
            return any("ray::_run_remotely" in part for part in process.cmdline())
        except psutil.Error:
            return False

    return [process.pid for process in psutil.Process().children(recursive=True) if busy(process)]


def test_a_fast_tokenizer_caught_out_is_given_up_for_the_whole_split(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", texts(600))
    job = text_job(tmp_path, tiny_chat_tokenizer, "plain", train=[str(path)], eval=[str(path)])
    plain = write_shards(checked(job, tiny_chat_tokenizer))
    assert plain.train.tokenizer == "gigatoken" and plain.train.fallback_reason is None
    # the tokenizers that the workers compare with is given another merge order than the one gigatoken loaded
    wrong = tmp_path / "wrong"
    spoil = stage.write_group

    def spoiled(work: Any, units: Any) -> Any:
        from trainers.tokenizer import gigatoken as fast_tokenizers
        from trainers.tokenizer.encoder import encoder_of
        from trainers.tokenizer.token_arrays import Tokens

        encode = fast_tokenizers.FastTokenizer.encode

        def lie(self: Any, given: list[str], special: bool) -> Any:
            tokens = encode(self, given, special)
            return Tokens(np.where(tokens.ids == tokens.ids[0], tokens.ids + 1, tokens.ids), tokens.offsets)

        encoder_of.cache_clear()
        fast_tokenizers.FastTokenizer.encode = lie  # type: ignore[method-assign]
        try:
            return spoil(work, units)
        finally:
            fast_tokenizers.FastTokenizer.encode = encode  # type: ignore[method-assign]

    monkeypatch.setattr(stage, "write_group", spoiled)
    job = text_job(wrong, tiny_chat_tokenizer, train=[str(path)], eval=[str(path)])
    shards = write_shards(checked(job, tiny_chat_tokenizer))
    assert shards.train.tokenizer == "tokenizers" and "the faster library" in str(shards.train.fallback_reason)
    assert [one.digest for one in shards.train.shards] == [one.digest for one in plain.train.shards]


@pytest.mark.parametrize("mode", ["exact", "near"])
def test_repeats_are_left_out_once_and_the_first_stays(
    mode: str, tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "UNIT_BYTES", 4000)
    words = [f"w{n}" for n in range(400)]
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(words, 60))} for _ in range(60)]
    same = [{"text": f"  {row['text'].upper()} "} for row in rows[:7]]
    near = [{"text": row["text"] + " indeed"} for row in rows[10:15]]
    path = write(tmp_path / "t.jsonl", [*rows, *same, *near])
    other = write(tmp_path / "e.jsonl", texts(3))
    job = text_job(tmp_path, tiny_chat_tokenizer, train=[str(path)], eval=[str(other)], dedup=mode, max_length=512)
    shards = write_shards(checked(job, tiny_chat_tokenizer))
    outcome = "removed:duplicate" if mode == "exact" else "removed:near_duplicate"
    assert shards.train.outcomes == {"kept": 72 - (7 if mode == "exact" else 12), outcome: 7 if mode == "exact" else 12}
    folder = shards_folder(Folder(job.storage), shards.train.key)
    gone = sorted(line.row for line in ledger_lines(folder, shards.train, outcome))
    starts = np.cumsum([0, *(len(line) for line in path.read_bytes().splitlines(keepends=True))]).tolist()
    assert gone == (starts[60:67] if mode == "exact" else starts[60:72])
    assert not [name for name in folder.list() if name.startswith(("prints", "signatures"))]
    assert load_written(job, tiny_chat_tokenizer) == shards


def test_rows_of_the_evaluation_set_are_reported_always_and_dropped_on_request(
    tmp_path: Path, tiny_chat_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = texts(10, 1000)
    path = write(tmp_path / "t.jsonl", [*texts(50), *({"text": row["text"].upper()} for row in held_out[:4])])
    other = write(tmp_path / "e.jsonl", held_out)
    data = {"train": [str(path)], "eval": [str(other)]}
    job = text_job(tmp_path, tiny_chat_tokenizer, **data)
    shards = write_shards(checked(job, tiny_chat_tokenizer))
    assert "4 of 54 training rows say what an evaluation row says" in caplog.text
    folder = shards_folder(Folder(job.storage), shards.train.key)
    assert folder.read_json(contamination_name(shards.eval.key))["rows"] == 4
    caplog.clear()
    job = text_job(tmp_path, tiny_chat_tokenizer, **data, decontaminate="drop")
    dropped = write_shards(checked(job, tiny_chat_tokenizer))
    assert dropped.train.outcomes["removed:in_evaluation"] == 4 and dropped.train.rows_in == 54
    assert dropped.eval == shards.eval and "say what an evaluation row says" not in caplog.text


def peak_of_driver(job: Job, model: Path) -> tuple[int, int]:
    """Shards written, and the driver's peak of traced memory in bytes."""
    first = write(Path(job.storage).parent / "first" / "t.jsonl", texts(3))
    write_shards(
        checked(text_job(first.parent, model, train=[str(first)], eval=[str(first)]), model)
    )  # imports, not traced
    tracemalloc.start()
    shards = write_shards(checked(job, model))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return len(shards.train.shards), peak


def test_the_driver_holds_no_more_where_shards_hold_more_rows(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = []
    other = write(tmp_path / "e.jsonl", texts(2, 90_000))
    for rows_a_shard in (1, 30):
        path = write(tmp_path / f"{rows_a_shard}.jsonl", texts(200 * rows_a_shard))
        monkeypatch.setattr(readers, "UNIT_BYTES", path.stat().st_size // 200 + 1)
        job = text_job(tmp_path, tiny_chat_tokenizer, f"s{rows_a_shard}", train=[str(path)], eval=[str(other)])
        count, peak = peak_of_driver(job, tiny_chat_tokenizer)
        assert count >= 195
        peaks.append(peak)
    assert peaks[1] < 1.5 * peaks[0] + 2**20


@pytest.mark.slow
def test_ten_thousand_shards_leave_only_their_records_with_the_driver(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": f"the film {i:05d}"} for i in range(10_000)])
    other = write(tmp_path / "e.jsonl", texts(2, 90_000))
    monkeypatch.setattr(readers, "UNIT_BYTES", path.stat().st_size // 10_000)
    memory = Path("/dev/shm")  # ten thousand synced files take minutes on a slow disk
    storage = tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path)
    job = text_job(tmp_path, tiny_chat_tokenizer, storage, train=[str(path)], eval=[str(other)])
    started = time.monotonic()
    try:
        count, peak = peak_of_driver(job, tiny_chat_tokenizer)
    finally:
        shutil.rmtree(storage)
    print(f"{count:,} shards in {time.monotonic() - started:.1f} s; driver's peak {peak / count:,.0f} bytes a shard")
    assert count == 10_000 and peak / count < 12_000


def test_conversations_of_all_shapes_make_one_split(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    alpaca = [{"instruction": f"say {i}", "input": "", "output": f"{i} is good"} for i in range(20)]
    sharegpt = [{"conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"{i} is good"}]}
                for i in range(20)]  # fmt: skip
    plain = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} is good"}]}
             for i in range(20)]  # fmt: skip
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in
             (("a", alpaca), ("b", sharegpt), ("c", plain), ("d", chat_rows(20)))]  # fmt: skip
    plain_data = plain_job(tmp_path, tiny_chat_tokenizer, train=[str(path) for path in paths], eval=[str(paths[0])])
    job = parse_job({**plain_data, "task": "sft"})
    shards = write_shards(checked(job, tiny_chat_tokenizer))
    assert shards.train.outcomes == {"kept": 80}
    held = open_train(job, shards)
    for index in range(20):
        ids = [held.row(index + 20 * kind).input_ids.tolist() for kind in range(3)]
        assert ids[0] == ids[1] == ids[2]


def test_a_changed_template_does_conversations_again_and_says_so(
    tmp_path: Path, tiny_chat_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator.sharding.stage")
    path = write(tmp_path / "c.jsonl", chat_rows(12))
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}")

    def shard(task: str, **data: Any) -> Shards:
        plain = plain_job(tmp_path, tiny_chat_tokenizer, train=[str(path)], eval=[str(path)], **data)
        return write_shards(checked(parse_job({**plain, "task": task}), tiny_chat_tokenizer))

    first = shard("sft")
    second = shard("sft", chat_template=str(template))
    assert f"the train shards {first.train.key} do not fit any more: form changed" in caplog.text
    assert f"the eval shards {first.eval.key} do not fit any more: form changed" in caplog.text
    assert "taken over" not in caplog.text
    assert [one.digest for one in first.train.shards] != [one.digest for one in second.train.shards]
    caplog.clear()
    assert shard("sft") == first and not caplog.text


def test_no_unit_is_written_in_a_process_that_belongs_to_a_process_group(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    """Every task asks before it tokenizes, and so does the driver; here the group is that of one rank."""
    import torch.distributed

    from orchestrator.sharding.ray_tasks import run_task

    path = write(tmp_path / "t.jsonl", texts(3))
    job = text_job(tmp_path, tiny_chat_tokenizer, train=[str(path)], eval=[str(path)])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="process group is alive"):
            write_shards(checked(job, tiny_chat_tokenizer))
        with pytest.raises(RuntimeError, match="process group is alive"):
            run_task(lambda work, units: "written", None, [])
        assert not list(Path(job.storage).rglob("shard-*"))
    finally:
        torch.distributed.destroy_process_group()
    assert run_task(lambda work, units: "written", None, []) == "written"
    assert write_shards(checked(job, tiny_chat_tokenizer)).train.rows_in == 3


def test_the_data_stage_loads_no_torch(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    """So no process group can be alive while rows are tokenized."""
    code = (
        "import sys, orchestrator.sharding.stage\nfrom trainers.tokenizer.encoder import read_spec, Encoder\n"
        "from trainers.tasks import load_task, EncodeRules\n"
        f"spec = read_spec({str(tiny_chat_tokenizer)!r})\n"
        "load_task('pretrain').encode([{'text': 'a'}], Encoder(spec), EncodeRules(8, 'split'))\n"
        "assert 'torch.distributed.distributed_c10d' not in sys.modules or "
        "not __import__('torch').distributed.is_initialized()\nassert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
