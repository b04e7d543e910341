"""How long `tuneyard plan` takes for a model of 70 billion parameters, of which there is a configuration alone.

python tests/benchmarks/bench_plan.py [--rounds 3]

The whole command as a user starts it, interpreter and imports included, for 64 GPUs; no weights, no network. Medians of
its processor time, and of the time by the clock, which other work on the machine makes longer.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import make_chat_tokenizer

LLAMA_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28_672, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}  # fmt: skip
JOB = """
name: seventy
task: sft
model: {path: model, dtype: bfloat16}
data: {train: [rows.jsonl], eval_fraction: 0.1, max_length: 4096, packing: true}
train: {global_batch_size: 128, epochs: 1, learning_rate: 1.0e-5}
storage: runs
"""
ROW = {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a row"}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        make_files(Path(place))
        told = [plan(Path(place)) for _ in range(rounds)]
    print(told[0][2])
    cpu_s, wall_s = (statistics.median(each[kind] for each in told) for kind in (0, 1))
    print(f"plan of 70 billion parameters: {cpu_s:.1f} s of processor time, {wall_s:.1f} s by the clock")


def make_files(folder: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**LLAMA_70B, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]).save_pretrained(
        folder / "model"
    )
    make_chat_tokenizer(folder / "model")
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 1000)
    (folder / "job.yaml").write_text(JOB)


def plan(folder: Path) -> tuple[float, float, str]:
    """Seconds of processor time, seconds by the clock, what was told."""
    words = [sys.executable, "-m", "orchestrator", "plan", "job.yaml", "--gpu", "h100-80", "--nodes", "8"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    answer = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if answer.returncode:
        raise SystemExit(f"plan ended with {answer.returncode}:\n{answer.stdout}{answer.stderr}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, seconds, answer.stdout


if __name__ == "__main__":
    main()
