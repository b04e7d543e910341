"""Exporting a checkpoint under a memory limit: ours beside DeepSpeed's zero_to_fp32, on the same two ranks' state.

python tests/benchmarks/bench_export.py [--layers 8] [--folder PLACE]    (as root: it makes control groups)

The limit is the largest tensor plus 256 MiB, libraries included. Also says whether the fp32 logits of the export are
bit-equal to those of the model that was saved.
"""

import argparse
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.crashing import make_engine
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, tiny_job
from tests.trainers.checkpoint.test_export import ALLOWANCE, EXPORT, run_within
from trainers.run.folder import step_name

ZERO_TO_FP32 = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        found = run_ranks(save_both, 2, place, arguments.layers)[0]
        pretrained = make_llama(folder / "pretrained", tokenizer_folder(folder))
        model_config(arguments.layers, 30_000).save_pretrained(pretrained)
        job = tiny_job(folder, pretrained, "sft", chat_rows(10)).model_dump_json()
        ours = (job, str(folder / "ours" / step_name(1)), str(folder / "export"))
        limit = found["largest"] + ALLOWANCE
        print(f"state {found['state'] / 1e9:.2f} GB, limit {limit / 2**20:.0f} MiB\n")
        print("| | limited | seconds | without a limit: peak MiB, mapped files included | seconds |")
        print("| --- | --- | ---: | ---: | ---: |")
        theirs = (str(folder / "theirs"), str(folder / "fp32"))
        for name, code, words in (("ours", EXPORT, ours), ("zero_to_fp32", ZERO_TO_FP32, theirs)):
            how, seconds, _ = run(code, words, limit)
            free, free_s, peak = run(code, (*words[:-1], words[-1] + "-free"), 1 << 40)
            print(f"| {name} | {how} | {seconds:.0f} | {peak / 2**20:,.0f} | {free_s:.0f}, {free} |", flush=True)
        print("\nfp32 logits bit-equal:", logits_of(folder / "export-free") == found["logits"])


def model_config(layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocabulary, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=8,
                       intermediate_size=1536, tie_word_embeddings=True, pad_token_id=0)  # fmt: skip


def tokenizer_folder(folder: Path) -> Path:
    """A word tokenizer, enough for an export."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    place = folder / "tokenizer"
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(place)
    return place


def save_both(place: str, layers: int) -> dict[str, Any]:
    """On one rank: a step, then both kinds of checkpoint and the logits."""
    import torch
    from transformers import LlamaForCausalLM

    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world
    from trainers.storage import Folder

    world = join_world(1)
    torch.manual_seed(0)
    engine = make_engine(world, model=LlamaForCausalLM(model_config(layers, 30_000)))
    tokens = torch.arange(32).view(4, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    agent = Checkpointer(engine, Folder(f"{place}/ours"), world, new_attempt(world), "key", "job", lambda event: None)
    agent.save(Progress(1, 0))
    agent.finish()
    engine.save_checkpoint(f"{place}/theirs", tag="one")
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=tokens).logits
    largest = max(4 * parameter.ds_numel for parameter in engine.module.parameters())
    return {"largest": largest, "state": agent.prepare(), "logits": digest(logits)}


def digest(tensor: Any) -> str:
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(tensor.contiguous().numpy()))


def logits_of(folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with torch.no_grad():
        return digest(AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(32).view(4, 8)).logits)


def run(code: str, words: tuple[str, ...], limit: int) -> tuple[str, float, int]:
    """How a program ends under a limit, its seconds, and its peak resident memory."""
    group = Path("/sys/fs/cgroup/memory") / f"tuneyard-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        peak = "\nprint(max(0, __import__('resource').getrusage(0).ru_maxrss) * 1024)"
        began = time.perf_counter()
        done = run_within(group, code + peak, *words)
        seconds = time.perf_counter() - began
    finally:
        group.rmdir()
    if done.returncode == 0:
        return "done", seconds, int(done.stdout.split()[-1])
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"ends with {done.returncode} {last[:200]}".strip(), seconds, 0


if __name__ == "__main__":
    main()
