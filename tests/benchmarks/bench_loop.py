"""The loop beside its peers, all with DeepSpeed ZeRO-3 on two gloo ranks of a CPU: a loop by hand, transformers' Trainer,
TRL's SFTTrainer.

python tests/benchmarks/bench_loop.py [--rounds 2] [--steps 8] [--trl PYTHON]    # of an environment that has trl too

`by hand` gets the engine's whole configuration from ours. On sequences of full length it is the peer of `ours`; on
documents, about half of a padded batch being padding, the Trainer is the peer of `ours unpacked` and `ours packed`, TRL
with its packing of the latter. Tokens that are no padding, a CPU second of both ranks; first steps are left out, for
ZeRO-3 learns then. Contenders take turns, round by round; medians. Nothing is shown unless losses of the first step agree.
"""

import argparse
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
import contextlib

from tests.ranks import free_port

RANKS, LENGTH, ROWS, MICRO, WARM_UP = 2, 256, 32, 4, 3
"""Rows a step; sequences a micro-batch and rank."""
WIDTHS = {"hidden_size": 192, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 6,
          "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
PEERS = {"ours": "by hand", "ours unpacked": "trainer", "ours packed": "trainer", "ours packed ": "trl"}
"""Whom each is compared with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl beside what the project needs")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        contend(asked)
        return
    names = ["ours", "by hand", "ours unpacked", "ours packed", "trainer"]
    if subprocess.run([asked.trl, "-c", "import trl"], capture_output=True, env=environment(0, 0)).returncode:
        print("trl is not there: its line is left out (--trl names a Python that has it)")
    else:
        names.append("trl")
    with tempfile.TemporaryDirectory() as place:
        asked.folder = Path(place)
        for kind in ("full", "unpacked", "packed"):
            make_job(asked.folder, kind, asked.steps)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(asked.rounds):
            for name in names:
                results[name].append(launch(asked, name))
                print(f"{name}: {results[name][-1]['speed']:,.0f} tokens a CPU second", file=sys.stderr)
    check_losses(results)
    print(f"{hook_ms():.3f} ms a step for hooks, events and heartbeat")
    print("| | over | tokens a CPU second | times |\n| --- | --- | ---: | ---: |")
    speeds = {name: statistics.median(each["speed"] for each in rounds) for name, rounds in results.items()}
    for name, peer in PEERS.items():
        if peer in speeds:
            speed = speeds[name.strip()]
            print(f"| {name.strip()} | {peer} | {speed:,.0f} / {speeds[peer]:,.0f} | {speed / speeds[peer]:.3f} |")


def environment(rank: int, port: int) -> dict[str, str]:
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | told | {"TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}


def launch(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both ranks of one contender: tokens a CPU second of the two together, losses."""
    python, port = asked.trl if name == "trl" else sys.executable, free_port()
    words = ["--contender", name, "--folder", str(asked.folder), "--steps", str(asked.steps)]
    ranks = [
        subprocess.Popen([python, __file__, *words], stdout=subprocess.PIPE, text=True, env=environment(rank, port))
        for rank in range(RANKS)
    ]
    told = [each.communicate()[0] for each in ranks]
    found = [json.loads(line.removeprefix("RESULT")) for text in told for line in text.splitlines()
             if line.startswith("RESULT")]  # fmt: skip
    if len(found) < RANKS:
        raise SystemExit(f"{name} failed:\n" + "\n".join(told))
    seconds = sum(sum(each["seconds"][WARM_UP:]) for each in found)
    return {"speed": sum(found[0]["tokens"][WARM_UP:]) / seconds, "losses": found[0]["losses"]}


def make_job(folder: Path, kind: str, steps: int) -> Any:
    """A job over rows of full length, or over documents, packed or not; its shards are written once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import make_chat_tokenizer
    from tests.tiny import shard_locally, tiny_job, write_rows
    from trainers.model.source import ModelFolder
    from trainers.verification.packing import decide_packing, with_packing

    model, packed = folder / "model", kind == "packed"
    if not model.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**WIDTHS)).save_pretrained(model)
        make_chat_tokenizer(model)
    fresh = not (folder / kind).exists()
    (folder / kind).mkdir(exist_ok=True)
    rows = [{"text": text} for text in texts(kind, steps)]
    job = tiny_job(
        folder / kind, model, "pretrain", rows[:1] * 2,
        data={"max_length": LENGTH, "packing": packed, "overlong": "truncate"},
        train={"global_batch_size": ROWS, "micro_batch_size": MICRO, "steps": steps, "learning_rate": 1e-4,
               "schedule": "constant", "weight_decay": 0.0, "verify": False, "deepspeed": "zero3"},
        checkpoint={"every_steps": 10**6},
    )  # fmt: skip
    write_rows(Path(job.data.train_paths[0]), rows)
    job = with_packing(job, decide_packing(job, ModelFolder(str(model), ""))) if packed else job
    if fresh:
        shard_locally(job)
    return job


def texts(kind: str, steps: int) -> list[str]:
    """Letters, a token each."""
    draw = np.random.default_rng(0)
    count = ROWS * steps * (3 if kind == "packed" else 1)
    lengths = np.full(count, 2 * LENGTH) if kind == "full" else draw.lognormal(np.log(LENGTH / 3), 0.7, count)
    return [bytes(draw.integers(97, 123, int(each), np.uint8)).decode() for each in lengths.clip(16, 2 * LENGTH)]


class Enough(Exception):
    """All steps are done; what a run does after them is not measured."""


def contend(asked: argparse.Namespace) -> None:
    """One rank of one contender: CPU seconds and tokens of each step, losses as far as the contender tells them."""
    import torch

    torch.set_num_threads(1)
    kind = {"ours": "full", "by hand": "full", "ours packed": "packed"}.get(asked.contender, "unpacked")
    job = make_job(asked.folder, kind, asked.steps)
    contender = {"by hand": by_hand, "trainer": trainer, "trl": trainer}.get(asked.contender, ours)
    marks, tokens, losses = contender(job, asked)
    result = {"seconds": np.diff(marks).tolist(), "tokens": tokens, "losses": losses}
    print("\nRESULT", json.dumps(result), flush=True)
    os._exit(0)  # engines and process groups need not be taken apart


def ours(job: Any, asked: argparse.Namespace) -> tuple[list[float], list[int], list[float]]:
    """The product's own rank."""
    from tests.trainers.training.test_training import Recorder
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    marks: list[float] = []

    class Clock(Recorder):
        def at(self, phase: Any, step: int) -> None:
            super().at(phase, step)
            if phase == "data":
                marks.append(time.process_time())
            elif phase == "save" and step == asked.steps:
                marks.append(time.process_time())
                raise Enough

    clock = Clock()
    with contextlib.suppress(Enough):
        run_rank(find_run(job), clock)
    steps = [event for event in clock.events if event.kind == "step"]
    return marks, np.diff([0, *(event.tokens for event in steps)]).tolist(), [event.loss for event in steps]


def batches(job: Any) -> list[list[Any]]:
    """Token ids of the rows of each step, in our order."""
    import torch

    from tests.peer import ordered
    from trainers.batching.order import job_order
    from trainers.batching.packing import index_packs
    from trainers.run.record import find_run

    run = find_run(job)
    rows = run.open_shards("train", run.load_task())
    packs = index_packs(job, rows)
    lines = ordered(job_order(job, len(packs)), packs, rows)
    return [[torch.from_numpy(np.array(row.input_ids, np.int64)) for row in step] for _, step in lines]


def configuration(job: Any) -> dict[str, Any]:
    """As our engine has it."""
    from trainers.batching.batch_plan import plan_batches
    from trainers.model.deepspeed_config import derive_config

    return derive_config(job, plan_batches(ROWS, MICRO, RANKS, LENGTH))


def by_hand(job: Any, _: argparse.Namespace) -> tuple[list[float], list[int], list[float]]:
    """A DeepSpeed loop as everybody writes it."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.model.engine import partitioned_on_load
    from trainers.model.zero_settings import with_settings

    rank, per_rank = int(os.environ["RANK"]), ROWS // RANKS
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(verbose=False)
    config = configuration(job)
    with partitioned_on_load(config):
        model: Any = AutoModelForCausalLM.from_pretrained(job.model.path).train()
    config = with_settings(config, model, RANKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    steps, losses = batches(job), []
    marks = [time.process_time()]
    for rows in steps:
        total = torch.zeros(())
        for part in torch.stack(rows[rank * per_rank : (rank + 1) * per_rank]).split(MICRO):
            loss = engine(input_ids=part, labels=part, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(float(total) * MICRO / ROWS)
        marks.append(time.process_time())
    return marks, [sum(map(len, rows)) for rows in steps], losses


def trainer(job: Any, asked: argparse.Namespace) -> tuple[list[float], list[int], list[float]]:
    """transformers' Trainer with ZeRO-3, rows in our order and padded to the longest of a batch; or TRL's with its
    packing, in its own order."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    marks: list[float] = []
    tokens: list[int] = []
    seen = [0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens.append(seen[0])
            seen[0] = 0

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lines = [torch.as_tensor(row["input_ids"]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(line) for line in lines])[:, None]
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}

    rows = [{"input_ids": row.tolist()} for step in batches(job) for row in step]
    shared = {
        "output_dir": str(asked.folder / "out"), "per_device_train_batch_size": MICRO, "max_steps": asked.steps,
        "gradient_accumulation_steps": ROWS // MICRO // RANKS, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "ddp_backend": "gloo", "deepspeed": configuration(job), "log_level": "error",
    }  # fmt: skip
    if asked.contender == "trl":
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        base: Any = SFTTrainer
        arguments = SFTConfig(**shared, packing=True, max_length=LENGTH)
        data: Any = Dataset.from_list(rows * 3)  # packed, there are fewer
        given = {"processing_class": AutoTokenizer.from_pretrained(job.model.path)}
    else:
        base, arguments, data = Trainer, TrainingArguments(**shared, remove_unused_columns=False), rows
        given = {"data_collator": padded}
    model = AutoModelForCausalLM.from_pretrained(job.model.path)

    class Counting(base):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any) -> Any:
            if asked.contender == "trl":
                return super()._get_train_sampler(*given)
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            seen[0] += RANKS * int((inputs["labels"] >= 0).sum())  # as many on the other rank, but for chance
            return super().training_step(model, inputs, *more, **named)

    peer = Counting(model=model, args=arguments, train_dataset=data, callbacks=[Clock()], **given)
    peer.train()
    marks.append(time.process_time())
    return marks, tokens, [line["loss"] for line in peer.state.log_history if "loss" in line]


def check_losses(results: dict[str, list[dict[str, Any]]]) -> None:
    """Nobody's time counts unless each begins with its peer's loss; packs of other documents have nearly that loss."""
    first = {name: rounds[0]["losses"][0] for name, rounds in results.items()}
    for name, peer in PEERS.items():
        apart = 1e-4 if name in ("ours", "ours unpacked") else 0.01
        if peer in first and abs(first[name.strip()] - first[peer]) > apart * first[peer]:
            raise SystemExit(f"losses of the first step differ, so times compare nothing: {first}")


def hook_ms(steps: int = 2000) -> float:
    """CPU time a step of all that a rank tells outside in it: five phases, four questions, one event."""
    from trainers.run.events import StepEvent
    from trainers.worker.heartbeat import HeartbeatPage
    from trainers.worker.stop_signal import PipeHooks, StopSignal

    with tempfile.TemporaryDirectory() as place, (Path(place) / "events").open("w") as events:
        hooks = PipeHooks(events, HeartbeatPage(Path(place) / "page"), StopSignal())
        told = {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 1, "tokens_per_s": 1.0, "step_s": 1.0}
        began = time.process_time()
        for step in range(steps):
            for phase in ("data", "step", "settle", "save", "step"):
                hooks.at(phase, step)  # type: ignore[arg-type]
            for _ in range(4):
                hooks.stop_reason()
            hooks.emit(StepEvent(step=step, data_wait_s=0.0, memory_gib=1.0, **told))
        return (time.process_time() - began) / steps * 1000


if __name__ == "__main__":
    main()
