"""A step on one GPU: ours by each way to keep the state, a plain torch loop, transformers' Trainer, DeepSpeed by hand.

python tests/benchmarks/bench_gpu.py [--size 135m|1b] [--length 2048] [--micro 4] [--rounds 2] [--write docs/gpu.md]
python tests/benchmarks/bench_gpu.py --size 8b --only "ours zero3-cpu-offload" "deepspeed offload"
python tests/benchmarks/bench_gpu.py --documents 8    # documents of many lengths, about eight a sequence, ours packed
python tests/benchmarks/bench_gpu.py --size tiny --device cpu    # a dry run: every line, no figure of worth

All train the same Llama of random weights on the same sequences in the same order: bf16, AdamW, clipping at 1. Each
contender is a process that imports, says so and waits; then one after the other trains, round by round, so nothing is
timed beside an import. `first step` is the time from that gate to the end of the first step. Losses of the first step
are compared before any time is shown. Medians over the rounds; the first two steps are left out. `ours` keeps fp32
masters and moments, the peers keep all in bf16 (DeepSpeed: masters). With documents the Trainer pads each batch to
its longest one; a quarter of the documents that ours has in a micro-batch is what fits then. Tokens that are no
padding count.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from orchestrator.training.node_report import free_port
from tests.tiny import shard_locally, tiny_job, write_rows
from trainers.training.profiling import PEAK_FLOPS

CONTENDERS = ("ours zero0", "ours compiled", "ours zero2", "ours zero3", "torch", "trainer", "deepspeed")
OF_DOCUMENTS = ("ours zero0", "ours compiled", "trainer")
SPREAD = 0.8
"""Of the logarithm of the documents' lengths."""
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
Steps = tuple[list[float], list[float], list[int]]
"""Of each step: seconds, loss, tokens that are no padding."""
WARM_UP, BEGIN, END = 2, "<!-- bench_gpu: begin -->", "<!-- bench_gpu: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", help="contenders")
    parser.add_argument("--documents", type=int, default=0, help="about so many a sequence; 0: one of full length")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.only = asked.only or (OF_DOCUMENTS if asked.documents else CONTENDERS)
    if asked.contender:
        contend(asked)
        return
    with tempfile.TemporaryDirectory() as place:
        asked.folder = Path(place)
        job = make_job(asked)
        results = race(asked)
        check_losses(results)
        lines = table(asked, job, results)
    print("\n".join(lines))
    if asked.write:
        write_table(asked.write, lines)


def make_job(asked: argparse.Namespace) -> Any:
    """Model, sequences of full length and shards, in the folder; the same whoever asks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import make_chat_tokenizer
    from trainers.model.source import ModelFolder
    from trainers.model.world import free_memory
    from trainers.verification.packing import decide_packing, with_packing

    folder = asked.folder
    if not (model := folder / "model").exists():
        import torch

        torch.manual_seed(0)
        config = LlamaConfig(**SIZES[asked.size], max_position_embeddings=asked.length, tie_word_embeddings=True)
        with torch.device(asked.device):  # a CPU draws a billion numbers in half a minute
            drawn = LlamaForCausalLM(config)
        drawn.to(torch.bfloat16).save_pretrained(model)
        del drawn
        free_memory()  # the contenders are other processes
        make_chat_tokenizer(model)
    rows = [{"text": text} for text in texts(asked)]
    job = tiny_job(
        folder, model, "pretrain", rows[:1] * 2,
        data={"max_length": asked.length, "packing": True, "overlong": "truncate"},
        train={"global_batch_size": asked.micro * asked.accumulation, "micro_batch_size": asked.micro,
               "steps": asked.steps, "learning_rate": 1e-5, "schedule": "constant", "verify": False},
        checkpoint={"every_steps": 10**6},
    )  # fmt: skip
    write_rows(Path(job.data.train_paths[0]), rows)
    job = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "bfloat16"})})
    job = with_packing(job, decide_packing(job, ModelFolder(str(model), "")))
    if not asked.contender:
        shard_locally(job)
    return job


def texts(asked: argparse.Namespace) -> list[str]:
    """Letters, a token each: sequences of full length, which are cut there, or documents."""
    draw = np.random.default_rng(0)
    sequences = asked.micro * asked.accumulation * asked.steps
    if not asked.documents:
        return [bytes(line).decode() for line in draw.integers(97, 123, (sequences, 2 * asked.length), np.uint8)]
    mean = asked.length / asked.documents
    lengths = draw.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, sequences * asked.documents)
    return [bytes(draw.integers(97, 123, int(each), np.uint8)).decode() for each in lengths.clip(16, asked.length - 8)]


def race(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What every contender said, by round. All import first; then one gate is opened after the other."""
    started = []
    for _ in range(asked.rounds):
        for name in asked.only:
            shared = ("size", "length", "micro", "accumulation", "steps", "device", "folder", "documents")
            words = [word for key in shared for word in (f"--{key}", str(getattr(asked, key)))]
            environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(free_port()), "TOKENIZERS_PARALLELISM": "false"}
            if asked.device == "cpu":
                environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, __file__, "--contender", name, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
            started.append((name, process))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
    try:
        for name, process in started:
            read_line(name, process, "READY")
        for name, process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            results[name].append(json.loads(read_line(name, process, "RESULT")))
            process.wait()
            print(f"{name}: {statistics.median(results[name][-1]['seconds']):.3f} s a step", file=sys.stderr)
    finally:
        for _, process in started:
            process.kill()
    return results


def read_line(name: str, process: Any, word: str) -> str:
    """The rest of the next line that begins with the word; libraries say other things meanwhile."""
    for line in process.stdout:
        if line.startswith(word):
            return str(line.removeprefix(word))
    raise SystemExit(f"{name} ended with {process.wait()} before {word}")


def contend(asked: argparse.Namespace) -> None:
    """One contender: import, wait for the gate, train, say seconds, losses and peak memory."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import trainers.worker.rank  # noqa: F401

    if not asked.contender.startswith("torch"):
        import deepspeed  # noqa: F401
    print("READY", flush=True)
    sys.stdin.readline()
    job = make_job(asked)
    kind, _, way = asked.contender.partition(" ")
    contender = {"ours": ours, "torch": by_hand, "deepspeed": by_hand, "trainer": trainer}[kind]
    began = time.perf_counter()
    seconds, losses, tokens = contender(job, asked, way)
    first = time.perf_counter() - began - sum(seconds[1:])
    if asked.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        card = torch.cuda.get_device_name()
    else:
        import resource

        peak, card = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "CPU"
    speed = sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:])
    result = {"seconds": seconds[WARM_UP:], "losses": losses, "peak": peak, "card": card, "speed": speed}
    result["first"] = first
    print("RESULT", json.dumps(result), flush=True)
    os._exit(0)  # engines and process groups need not be taken apart


class Enough(Exception):
    """All steps are done; what a run does after them is not measured."""


def ours(job: Any, asked: argparse.Namespace, way: str) -> Steps:
    """The product's own rank, without its last checkpoint."""
    from tests.trainers.training.test_training import Recorder
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    class Clock(Recorder):
        def emit(self, event: Any) -> None:
            super().emit(event)
            if event.kind == "step" and event.step == asked.steps:
                raise Enough

    settings = {"deepspeed": "zero0", "compile": True} if way == "compiled" else {"deepspeed": way}
    job = job.model_copy(update={"train": job.train.model_copy(update=settings)})
    clock = Clock()
    with contextlib.suppress(Enough):
        run_rank(find_run(job), clock)
    steps = [event for event in clock.events if event.kind == "step"]
    tokens = np.diff([0, *(event.tokens for event in steps)]).tolist()
    return [event.step_s for event in steps], [event.loss for event in steps], tokens


def batches(job: Any) -> list[Any]:
    """The sequences of each step, in our order."""
    import torch

    from tests.peer import ordered
    from trainers.batching.order import job_order
    from trainers.batching.packing import index_packs
    from trainers.run.record import find_run

    run = find_run(job)
    rows = run.open_shards("train", run.load_task())
    packs = index_packs(job, rows)
    lines = ordered(job_order(job, len(packs)), packs, rows)
    return [torch.from_numpy(np.stack([row.input_ids for row in step]).astype(np.int64)) for _, step in lines]


def by_hand(job: Any, asked: argparse.Namespace, way: str) -> Steps:
    """A loop as everybody writes it: torch alone, or with a DeepSpeed ZeRO-3 engine, its state on the host or not."""
    import torch
    from transformers import AutoModelForCausalLM

    partitioned = asked.contender.startswith("deepspeed")
    if partitioned:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled first
        torch.distributed.init_process_group("nccl" if asked.device == "cuda" else "gloo")
        deepspeed.init_distributed(verbose=False)
        config = deepspeed_config(asked, offloaded=way == "offload")
        alive = HfDeepSpeedConfig(config)  # transformers looks for it while it loads
    model: Any = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.bfloat16).train()
    if not partitioned:
        model.to(asked.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    if partitioned:
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        del alive
    seconds, losses = [], []
    for step in batches(job):
        began, total = clock(asked), 0.0
        for part in step.split(asked.micro):
            ids = part.to(asked.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if partitioned:
                model.backward(loss)
                model.step()
            else:
                (loss / asked.accumulation).backward()
            total += loss.detach()
        if not partitioned:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(clock(asked) - began)
        losses.append(float(total) / asked.accumulation)
    return seconds, losses, [asked.micro * asked.accumulation * asked.length] * len(seconds)


def trainer(job: Any, asked: argparse.Namespace, _: str) -> Steps:
    """transformers' Trainer without DeepSpeed: the same sequences in the same order, or documents as they come."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock(asked)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(clock(asked) - self.began)

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}

    data = documents(job) if asked.documents else [row for step in batches(job) for row in step]
    rows = max(asked.micro * (asked.documents or 1) // (4 if asked.documents else 1), 1)
    accumulation = asked.accumulation * (4 if asked.documents else 1)
    per_step = rows * accumulation
    tokens += [sum(map(len, data[at : at + per_step])) for at in range(0, len(data), per_step)]
    arguments = TrainingArguments(
        str(asked.folder / "trainer"), per_device_train_batch_size=rows, max_steps=asked.steps,
        gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no", bf16=True, report_to=[],
        learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.01, optim="adamw_torch_fused",
        max_grad_norm=1.0, disable_tqdm=True, use_cpu=asked.device == "cpu",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.bfloat16)
    peer = InOrder(model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[Clock()])
    peer.train()
    return seconds, [line["loss"] for line in peer.state.log_history if "loss" in line], tokens[: len(seconds)]


def documents(job: Any) -> list[Any]:
    """Every document, as it lies in the shards."""
    import torch

    from trainers.run.record import find_run

    run = find_run(job)
    rows = run.open_shards("train", run.load_task())
    return [torch.from_numpy(np.array(rows.row(at).input_ids, np.int64)) for at in range(len(rows))]


def deepspeed_config(asked: argparse.Namespace, offloaded: bool) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": True}
    away = {"offload_optimizer": host, "offload_param": host} if offloaded else {}
    return {
        "train_micro_batch_size_per_gpu": asked.micro,
        "gradient_accumulation_steps": asked.accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, **away},
        "zero_force_ds_cpu_optimizer": False,
    }


def clock(asked: argparse.Namespace) -> float:
    """Now, once the card has done what it was given."""
    if asked.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def check_losses(results: dict[str, list[dict[str, Any]]]) -> None:
    """Nobody's time counts unless all begin with the same loss: the same rows, model and mean."""
    first = {name: rounds[0]["losses"][0] for name, rounds in results.items()}
    reference = statistics.median(first.values())
    apart = {name: loss for name, loss in first.items() if abs(loss - reference) > 0.01 * reference}
    if apart:
        raise SystemExit(f"losses of the first step differ, so times compare nothing: {first}")


def table(asked: argparse.Namespace, job: Any, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown, with the plan's memory beside the measured one."""
    from trainers.model.memory import GIB, StepShape, needs
    from trainers.model.model_size import measure_size

    size = measure_size(job, job.model.path)
    said = {f"ours {n.way}": n.counted for n in needs(size, 1, StepShape(asked.micro, asked.accumulation))}
    tokens = asked.micro * asked.accumulation * asked.length
    shape = SIZES[asked.size]
    length = asked.length / (asked.documents or 1)
    attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * length  # causal: half of the square
    flops = tokens * (6 * size.parameters + attention)
    card = next(iter(results.values()))[0]["card"]
    peak = next((figure for part, figure in PEAK_FLOPS.items() if part in card), None)
    lines = [
        f"{card}, Llama {asked.size} ({size.parameters:,} parameters), {asked.micro} x {asked.accumulation} sequences "
        f"of {asked.length} tokens a step{_of_documents(asked)}, {asked.rounds} rounds of {asked.steps} steps:",
        "",
        "| | s a step | first step | tokens/s | MFU | peak GiB | plan's GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rounds in results.items():
        step = statistics.median(second for each in rounds for second in each["seconds"])
        speed = statistics.median(each["speed"] for each in rounds)
        use = f"{flops / tokens * speed / peak:.1%}" if peak else "-"
        plan = f"{said[name] / GIB:.1f}" if name in said else ""
        gib = max(each["peak"] for each in rounds) / GIB
        first = statistics.median(each["first"] for each in rounds)
        lines.append(f"| {name} | {step:.3f} | {first:.1f} | {speed:,.0f} | {use} | {gib:.1f} | {plan} |")
    return lines


def _of_documents(asked: argparse.Namespace) -> str:
    return f" of about {asked.documents} documents" if asked.documents else ""


def write_table(page: Path, lines: list[str]) -> None:
    """Put the table in the place of the one before."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
