"""Peak resident memory of one writer of shards: from 100 MB to 2 GB of input, and for one document of 64 MB.

python tests/benchmarks/bench_data_memory.py --bpe FOLDER --wordpiece FOLDER [--mb 100 400 2000]

The document is tokenized by the faster library and by tokenizers, as after a fallback; without a blank; and for mlm.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import sys
from trainers.shards.keys import plan_splits
from trainers.sources.readers import plan_units, task_columns
from trainers.shards.writer import ShardWork, write_units
from trainers.tokenizer.encoder import TokenizerSpec
from trainers.job.load import parse_job
from trainers.storage import Folder
from trainers.tasks import EncodeRules
import json
path, model, storage, spec, quick, task = sys.argv[1:]
job = parse_job({"name": "b", "task": task, "model": {"path": model},
                 "data": {"train": [path], "eval": [path], "max_length": 4096},
                 "train": {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4}, "storage": storage})
plan, _ = plan_splits(job, model)
work = ShardWork(Folder(storage), plan, task, task_columns(job), EncodeRules(4096, "split"),
                 TokenizerSpec(**json.loads(open(spec).read())), quick == "True")
tokens = sum(record.tokens for _, record in write_units(work, plan_units(plan.sources)))
# VmHWM, since ru_maxrss starts from the parent's size
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(tokens, int(peak) / 1024)
"""


def peak_mib(path: Path, model: str, folder: Path, quick: bool = True, task: str = "pretrain") -> tuple[int, float]:
    from dataclasses import asdict

    from trainers.tokenizer.encoder import read_spec

    spec = folder / "spec.json"
    spec.write_text(json.dumps(asdict(read_spec(model))))
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-c", CODE, str(path), model, storage, str(spec), str(quick), task]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, peak = done.stdout.split()
    return int(tokens), float(peak)


def main() -> None:
    from bench_data_speed import write_input

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bpe", required=True)
    parser.add_argument("--wordpiece", required=True)
    parser.add_argument("--mb", type=float, nargs="*", default=[100, 400, 2000])
    arguments = parser.parse_args()
    print("| input | tokens | peak MiB of one writer |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = write_input("pretrain", folder, 100).read_bytes()
        for size in arguments.mb:
            path = folder / f"{size:g}.jsonl"
            with path.open("wb") as stream:
                while stream.tell() < size * 1e6:
                    stream.write(base)
            tokens, peak = peak_mib(path, arguments.bpe, folder)
            print(f"| {path.stat().st_size / 1e6:,.0f} MB | {tokens:,} | {peak:,.0f} |", flush=True)
            path.unlink()
        text = "\n".join(json.loads(line)["text"] for line in base.splitlines())[: 64 * 2**20]
        one = folder / "one.jsonl"
        one.write_text(json.dumps({"text": text}) + "\n")
        for kind, model in (("byte-level BPE", arguments.bpe), ("WordPiece", arguments.wordpiece)):
            for quick in (True, False):
                tokens, peak = peak_mib(one, model, folder, quick)
                how = "the faster library" if quick else "tokenizers"
                size = len(text) / 2**20
                print(f"| one document of {size:.0f} MiB, {kind} by {how} | {tokens:,} | {peak:,.0f} |", flush=True)
        tokens, peak = peak_mib(one, arguments.wordpiece, folder, task="mlm")
        print(f"| the same, WordPiece, task mlm | {tokens:,} | {peak:,.0f} |", flush=True)
        one.write_text(json.dumps({"text": re.sub(r"\s+", "", text)}) + "\n")
        for kind, model in (("byte-level BPE", arguments.bpe), ("WordPiece", arguments.wordpiece)):
            tokens, peak = peak_mib(one, model, folder, False)
            print(f"| the same without a blank, {kind} by tokenizers | {tokens:,} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
