"""Small real jobs whose ranks' memory is measured: models, data, and what a rank held at its peak."""

import ctypes
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_chat_tokenizer
from tests.tiny import shard_locally, tiny_job, write_rows
from trainers.host_memory import M_MMAP_THRESHOLD
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.deepspeed_config import read_template
from trainers.model.memory import GIVE_BACK_BYTES, Need, StepShape, needs

MIB = 2**20
STEPS = 2
"""The moments exist from the first update on, so the second step is the fullest."""
LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**LLAMA, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 4096},
    "small": {**LLAMA, "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1408, "vocab_size": 4096},
    "deep": {**LLAMA, "hidden_size": 384, "num_hidden_layers": 16, "intermediate_size": 1024, "vocab_size": 4096},
    "wide": {**LLAMA, "hidden_size": 768, "num_hidden_layers": 4, "intermediate_size": 2048, "vocab_size": 4096},
    "vocabulary": {**LLAMA, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1408,
                   "vocab_size": 32_000},
    "tall": {**LLAMA, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "vocab_size": 4096},
    "broad": {**LLAMA, "hidden_size": 1536, "num_hidden_layers": 4, "intermediate_size": 6144, "vocab_size": 4096},
    "slim": {**LLAMA, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 8192},
    "bert": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
             "vocab_size": 4096, "max_position_embeddings": 1024},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One job."""

    shape: str
    length: int = 512
    micro: int = 2
    accumulation: int = 1
    again: str | int = "none"
    documents: int = 1
    """In a sequence, about; over 1 they are packed."""
    workers: int = 1
    way: str = "zero0"
    lora: bool = False
    task: str = "pretrain"
    dtype: str = "float32"
    sharing: int = 1
    """Ranks that share each sequence."""
    tiled: bool = False
    """Whether feed-forward layers are computed in tiles."""
    groups: int = 0
    """Millions of values that are updated at a time, by a DeepSpeed file of the job's own; 0: as the template says."""

    def __str__(self) -> str:
        parts = [f"{self.shape} {self.length}x{self.micro}", self.way, f"{self.workers} ranks"]
        parts += [f"x{self.accumulation}"] * (self.accumulation > 1) + [f"again {self.again}"] * (self.again != "none")
        parts += ["packed"] * (self.documents > 1) + ["lora"] * self.lora + [self.task] * (self.task != "pretrain")
        parts += [f"shared by {self.sharing}"] * (self.sharing > 1) + ["tiled"] * self.tiled
        parts += ["bf16"] * (self.dtype == "bfloat16") + [f"groups of {self.groups} M"] * (self.groups > 0)
        return ", ".join(parts)


def make_model(folder: Path, shape: str) -> Path:
    """A folder with random weights, made once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

    if not folder.exists():
        torch.manual_seed(0)
        if shape == "bert":
            AutoModelForMaskedLM.from_config(BertConfig(**SHAPES[shape])).save_pretrained(folder)
        else:
            AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape])).save_pretrained(folder)
        make_chat_tokenizer(folder)
        if shape == "bert":
            make_word_tokenizer(folder)
    return folder


def make_word_tokenizer(folder: Path) -> None:
    """For an encoder: letters as WordPiece, with its special tokens."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{chr(at)}" for at in range(97, 123))]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def make_job(root: Path, cell: Cell) -> Job:
    """The job of a cell, its shards written."""
    from trainers.model.source import ModelFolder
    from trainers.verification.packing import decide_packing, with_packing

    model = make_model(root / f"model-{cell.shape}", cell.shape)
    folder = root / str(cell).replace(" ", "_")
    draw = np.random.default_rng(0)
    length, batch = cell.length * 2 // cell.documents, cell.micro * cell.accumulation * cell.workers // cell.sharing
    if cell.documents > 1:
        length = cell.length // cell.documents
    gap = " " if cell.shape == "bert" else ""  # its tokenizer knows no word of over 100 letters
    texts = [
        gap.join(bytes(line).decode())
        for line in draw.integers(97, 123, (batch * STEPS * cell.documents, length), np.uint8)
    ]
    labels = {"label": "a"} if cell.task == "classify" else {}
    data = [{"text": text, **labels, **({"label": "ab"[at % 2]} if labels else {})} for at, text in enumerate(texts)]
    disk = {"offload_folder": str(folder / "swap")} if "nvme" in cell.way else {}
    packing = {"packing": cell.documents > 1} if cell.task == "pretrain" else {}
    job = tiny_job(
        folder, model, cell.task, data[:4],
        data={"max_length": cell.length, "overlong": "truncate", **packing},
        train={"global_batch_size": batch, "micro_batch_size": cell.micro, "steps": STEPS, "learning_rate": 1e-5,
               "schedule": "constant", "verify": False, "deepspeed": template_of(folder, cell),
               "spike_factor": None, "activation_checkpointing": cell.again, "feed_forward_tiles": cell.tiled,
               **({"sequence_parallel": cell.sharing} if cell.sharing > 1 else {}), **disk},
        scale={"workers": cell.workers, "gpus_per_worker": 0},
        checkpoint={"every_steps": 10**6},
    )  # fmt: skip
    lora = LoraSection(rank=8) if cell.lora else None
    job = job.model_copy(update={"model": job.model.model_copy(update={"dtype": cell.dtype, "lora": lora})})
    write_rows(Path(job.data.train_paths[0]), data)
    if cell.task == "pretrain":
        job = with_packing(job, decide_packing(job, ModelFolder(str(model), "")))
    shard_locally(job)
    return job


def template_of(folder: Path, cell: Cell) -> str:
    """The name of the cell's template, or the path of a file like it with smaller groups."""
    if not cell.groups:
        return cell.way
    folder.mkdir(parents=True, exist_ok=True)
    template = read_template(cell.way)
    template["zero_optimization"]["sub_group_size"] = cell.groups * 10**6
    (folder / "zero3.json").write_text(json.dumps(template))
    return str(folder / "zero3.json")


def status_bytes(name: str) -> int:
    """A line of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def train_and_measure(job: Job, exact: bool) -> dict[str, float]:
    """Be a rank of the job to its end: resident bytes before anything of it is loaded, and at the peak; processor
    seconds of the last step.

    Args:
        exact: the C library gives the memory of every freed tensor back at once; else it keeps some for the next.
    """
    from tests.trainers.training.test_training import Recorder
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    run = find_run(job)
    if exact:
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVE_BACK_BYTES)
    else:
        os.environ["MALLOC_TOP_PAD_"] = "0"  # read at a process's start; here it says that ranks shall leave that be
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = status_bytes("VmRSS")

    peak, began, step_s = 0, 0.0, 0.0

    class Watch(Recorder):
        def at(self, phase: Any, step: int) -> None:
            nonlocal peak, began, step_s
            peak = max(peak, status_bytes("VmHWM"))
            if phase == "step":
                began = time.process_time()
            if phase == "settle":
                step_s = time.process_time() - began

    run_rank(run, Watch())
    return {"base": base, "peak": max(peak, status_bytes("VmHWM")) - base, "step_s": step_s}


def predict(job: Job, cell: Cell) -> Need:
    """What the plan counts for a rank of the cell; its imports, which a fork shares, are `CPU_IMPORT_BYTES` of it."""
    from trainers.model.model_size import measure_size

    every = {"none": 0, "full": 1}.get(str(cell.again), cell.again)
    step = StepShape(cell.micro, cell.accumulation, int(every), tiled=cell.tiled)
    said = needs(measure_size(job, job.model.path), cell.workers, step, on_card=False)
    return next(need for need in said if need.way == cell.way)
