"""Rows to committed shards, beside the usual tools, in one run: byte-level BPE, WordPiece and chats.

python tests/benchmarks/bench_data_speed.py [--mb 400] [--peer-mb 16] [--repeats 3] [--bpe FOLDER] [--wordpiece FOLDER]

The text is the Python source of the installed packages, cut into documents, no document twice. Slow peers read a part
of it, as their rate does not depend on the amount. Tools take turns; medians are given. Ray and its workers are started
before, on other documents, and that time is printed apart: a tokenizer alone has no such start.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENT_CHARS = {"pretrain": 2500, "classify": 250, "sft": 700}


def documents(chars: int, limit_bytes: float, last_first: bool = False) -> Iterator[str]:
    root, size = Path(np.__file__).parents[1], 0
    for path in sorted(root.rglob("*.py"), reverse=last_first):
        text = path.read_text(errors="ignore")
        for start in range(0, len(text), chars):
            if text[start : start + chars].strip():
                size += len(text[start : start + chars].encode())
                yield text[start : start + chars]
        if size > limit_bytes:
            return


def row_of(task: str, text: str, number: int) -> dict[str, Any]:
    if task != "sft":
        return {"text": text, "label": str(number % 2)}
    third = len(text) // 3
    said = [text[:third], text[third : 2 * third], text[2 * third :], f"done {number}"]
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": part or "?"} for role, part in zip(roles, said, strict=True)]}


def write_input(task: str, folder: Path, megabytes: float, last_first: bool = False) -> Path:
    path = folder / f"{task}-{megabytes:g}{'-other' if last_first else ''}.jsonl"
    if not path.exists():
        with path.open("w") as stream:
            for number, text in enumerate(documents(DOCUMENT_CHARS[task], megabytes * 1e6, last_first)):
                stream.write(json.dumps(row_of(task, text, number)) + "\n")
    return path


def ours(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """Seconds and tokens."""
    from orchestrator.sharding.stage import write_shards
    from tests.tiny import checked
    from trainers.job.load import parse_job

    storage = folder / "storage"
    shutil.rmtree(storage, ignore_errors=True)
    small = folder / f"{task}-eval.jsonl"
    small.write_text(json.dumps(row_of(task, "a few words of text", 0)) + "\n")
    data = {"train": [str(path)], "eval": [str(small)], "max_length": 4096, "max_drop_fraction": 1.0}
    train = {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4}
    job = parse_job({"name": "b", "task": task, "model": {"path": model}, "data": data, "train": train,
                     "storage": str(storage)})  # fmt: skip
    started = time.perf_counter()
    shards = write_shards(checked(job, model))
    seconds = time.perf_counter() - started
    assert task == "classify" or shards.train.tokenizer == "gigatoken", shards.train.fallback_reason
    return seconds, shards.train.total("tokens")


def with_datasets(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """datasets.map(batched=True, num_proc=2) and save_to_disk."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def encode(batch: Any) -> Any:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    started = time.perf_counter()
    done = loaded.map(encode, batched=True, num_proc=2, remove_columns=loaded.column_names)
    done.save_to_disk(folder / "saved")
    seconds = time.perf_counter() - started
    return seconds, sum(map(len, done["input_ids"]))


def with_masks_by_prefix(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """Chats as trainers without generation tags in the template do it: the conversation rendered and tokenized turn by
    turn, each prefix's length telling where the assistant speaks; two processes.
    """
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def encode(row: Any) -> Any:
        messages = row["messages"]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
                start, end = len(asked), len(tokenizer.apply_chat_template(messages[: turn + 1], return_dict=False))
                mask[start:end] = [1] * (end - start)
        return {"input_ids": ids, "assistant_masks": mask}

    started = time.perf_counter()
    done = loaded.map(encode, num_proc=2, remove_columns=loaded.column_names)
    done.save_to_disk(folder / "saved")
    seconds = time.perf_counter() - started
    return seconds, sum(map(len, done["input_ids"]))


def with_generation_tags(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """Chats by apply_chat_template(return_assistant_tokens_mask=True), one run of the template a row; two processes."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def encode(row: Any) -> Any:
        done = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": done["input_ids"], "assistant_masks": done["assistant_masks"]}

    started = time.perf_counter()
    done = loaded.map(encode, num_proc=2, remove_columns=loaded.column_names)
    done.save_to_disk(folder / "saved")
    seconds = time.perf_counter() - started
    return seconds, sum(map(len, done["input_ids"]))


def _tokenize_part(model: str, texts: list[str], quick: bool) -> tuple[float, int]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from trainers.tokenizer.encoder import Encoder, read_spec

    encoder = Encoder(read_spec(model), quick)
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        if encoder._fast is not None:
            tokens += len(encoder._fast.encode(part, False).ids)
        else:
            tokens += sum(len(one.ids) for one in encoder._backend.encode_batch_fast(part))
    return time.perf_counter() - started, tokens


def _alone(path: Path, model: str, quick: bool) -> tuple[float, float]:
    texts = [json.loads(line)["text"] for line in path.open()]
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(_tokenize_part, [model] * 2, [texts[::2], texts[1::2]], [quick] * 2))
    return max(seconds for seconds, _ in parts), sum(tokens for _, tokens in parts)


def quick_alone(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """The fast tokenizer on the same texts, already in memory as strings, in two processes, nothing written."""
    return _alone(path, model, True)


def tokenizers_alone(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """The tokenizers library in the same way."""
    return _alone(path, model, False)


FILE_CODE = """
import sys, time, numpy
from gigatoken.gigatoken_rs import JsonlFileSource
from tests.tiny import checked
from trainers.tokenizer.encoder import Encoder, read_spec
quick = Encoder(read_spec(sys.argv[1]))._fast.bare.__self__._giga
started = time.perf_counter()
ids = numpy.asarray(quick.encode_files(JsonlFileSource([sys.argv[2]]), parallel=True).layout.content.data)
print(time.perf_counter() - started, len(ids))
"""


def gigatoken_on_the_file(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """gigatoken on the same bytes: its own reader of jsonl files, with a thread a core, nothing written."""
    done = subprocess.run([sys.executable, "-c", FILE_CODE, model, str(path)], capture_output=True, check=True)
    seconds, tokens = map(float, done.stdout.split())
    return seconds, tokens


def ours_started(task: str, path: Path, model: str, folder: Path) -> tuple[float, float]:
    """Ours in a fresh Ray, whose workers have started and have loaded the tokenizer, on other documents."""
    import ray

    started = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    began = time.perf_counter()
    ours(task, write_input(task, folder, 0.01, last_first=True), model, folder)
    print(f"Ray started in {began - started:.1f} s, the first small split took {time.perf_counter() - began:.1f} s")
    ours(task, write_input(task, folder, 70, last_first=True), model, folder)  # until every worker has had a task
    found = ours(task, path, model, folder)
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=400)
    parser.add_argument("--peer-mb", type=float, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bpe", required=True, help="model folder with a byte-level BPE and a chat template")
    parser.add_argument("--wordpiece", required=True, help="model folder with a WordPiece tokenizer")
    parser.add_argument("--only", nargs="*", default=["bpe", "wordpiece", "chat"])
    arguments = parser.parse_args()
    mb, few = arguments.mb, arguments.peer_mb
    plans: dict[str, tuple[str, str, float, list[tuple[str, Callable[..., Any], float]]]] = {
        "bpe": ("pretrain", arguments.bpe, mb, [("datasets.map + save_to_disk", with_datasets, few),
                                                ("gigatoken alone on the file", gigatoken_on_the_file, mb),
                                                ("gigatoken alone on strings", quick_alone, mb)]),
        "wordpiece": ("classify", arguments.wordpiece, mb / 2, [("datasets.map + save_to_disk", with_datasets, few),
                                                                ("tokenizers alone on strings", tokenizers_alone, few),
                                                                ("words alone on strings", quick_alone, mb / 2)]),
        "chat": ("sft", arguments.bpe, mb, [("prefix by prefix", with_masks_by_prefix, few / 4),
                                            ("generation tags", with_generation_tags, few / 4)]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in arguments.only:
            measure(name, folder, arguments.repeats, *plans[name])


def measure(
    name: str,
    folder: Path,
    repeats: int,
    task: str,
    model: str,
    megabytes: float,
    peers: list[tuple[str, Callable[..., Any], float]],
) -> None:
    """Let the tools take turns, and print their rates."""
    tools = (("ours", ours_started, megabytes), *peers)
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for tool, function, size in tools:
            measured.setdefault(tool, []).append(function(task, write_input(task, folder, size), model, folder))
            for left in ("cache", "saved"):
                shutil.rmtree(folder / left, ignore_errors=True)
    print("\n| data | tool | input MB | s | M tokens/s | ours is |\n| --- | --- | ---: | ---: | ---: | ---: |")
    rates = {tool: statistics.median(tokens / seconds / 1e6 for seconds, tokens in measured[tool]) for tool in measured}
    for tool, _, size in tools:
        seconds = statistics.median(one for one, _ in measured[tool])
        ratio = f"{rates['ours'] / rates[tool]:.2f} x"
        held = write_input(task, folder, size).stat().st_size / 1e6  # the installed packages may hold less
        print(f"| {name} | {tool} | {held:,.0f} | {seconds:.2f} | {rates[tool]:.2f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
