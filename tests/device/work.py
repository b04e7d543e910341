"""What runs on the second device, in a process of its own: `look` gives what happened, `tests/trainers` says what must.

Every result is a plain value, so that it can be sent back.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.architectures.families import write_model
from tests.tiny import shard_locally, tiny_job
from tests.trainers.evaluation.test_label_order import with_head
from tests.trainers.tasks import small
from trainers.architecture import DOCUMENTS
from trainers.job.sections import GenerateSection, LoraSection

CHECKED = ("pretrain", "sft", "classify causal", "mlm", "tag", "extract", "regression", "cosine", "several", "T5")
"""Small jobs of every task, packed and not."""


def more_jobs(folder: Path) -> dict[str, Any]:
    """Jobs for what the small ones leave out of the training loss."""
    encoder, decoder = small.bert(folder / "bert", dropout=0.1), small.llama(folder / "llama")
    words = [{"text": row["source"], "label": row["source"][:3]} for row in small.echo_rows(40)]
    labels = sorted({row["label"] for row in words[8:]})
    teacher = with_head(encoder, folder / "teacher", labels, np.random.default_rng(0).normal(size=(len(labels), 32)))
    jobs = {
        "class weights": tiny_job(folder / "weights", encoder, "classify", words,
                                  train={"class_weights": "balanced", "label_smoothing": 0.1}),
        "several smoothed": tiny_job(folder / "several", encoder, "classify", small.several_rows(40),
                                     data={"multi_label": True}, train={"label_smoothing": 0.1}),
        "distilled": tiny_job(folder / "distilled", decoder, "pretrain", small.plain_rows(40),
                              train={"distill": {"teacher": str(decoder)}}),
        "distilled labels": tiny_job(folder / "labels", encoder, "classify", words,
                                     train={"distill": {"teacher": str(teacher)}}),
        "noise": tiny_job(folder / "noise", decoder, "pretrain", small.plain_rows(40), train={"neftune_alpha": 5.0}),
        "smoothed": tiny_job(folder / "smoothed", decoder, "pretrain", small.plain_rows(40),
                             train={"label_smoothing": 0.1}),
    }  # fmt: skip
    packed = {"packing": True, "max_length": 32}
    carries = write_model("lfm2", folder / "lfm2", small.chat_tokenizer(folder / "words"))
    jobs["by bounds"] = tiny_job(folder / "bounds", decoder, "pretrain", small.plain_rows(40), data=packed)
    jobs["states by bounds"] = tiny_job(folder / "states", carries, "pretrain", small.plain_rows(40), data=packed)
    for job in jobs.values():
        shard_locally(job)
    for name in ("by bounds", "states by bounds"):
        by = jobs[name].model.model_copy(update={"attention": DOCUMENTS})
        jobs[name] = jobs[name].model_copy(update={"model": by})
    adapted = jobs["smoothed"].model.model_copy(update={"lora": LoraSection(rank=2)})
    return {**jobs, "adapters": jobs["smoothed"].model_copy(update={"model": adapted})}


def look(folder: str) -> dict[str, dict[str, Any]]:
    """Everything, by part and name; an exception is a result too."""
    import torch

    from tests.device.far import FAR

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    jobs, more = small.small_jobs(Path(folder) / "jobs"), more_jobs(Path(folder) / "more")
    jobs = {name: jobs[name] for name in (*CHECKED, "seq2seq causal")}
    return {
        "refusals": {"both": refusals(FAR)},
        "self-tests": {name: guarded(self_tests, jobs[name], Path(folder) / f"checks {name}", FAR) for name in CHECKED},
        "losses": {name: guarded(losses, job, FAR) for name, job in {**jobs, **more}.items()},
        "evaluations": {name: guarded(evaluations, job, FAR) for name, job in jobs.items()},
        "waits": {name: guarded(waits_of_a_step, job, FAR) for name, job in {**jobs, **more}.items()},
        "warm": {"tag": guarded(kept_warm, jobs["tag"], Path(folder) / "warm", FAR)},
        "saves": {"copy and export": guarded(save, jobs["pretrain"], Path(folder) / "save", FAR)},
    }


def guarded(part: Callable[..., Any], *arguments: Any) -> Any:
    import traceback

    try:
        return part(*arguments)
    except Exception:
        return traceback.format_exc()


def refusals(far: Any) -> list[str]:
    """What a card refuses is refused here, or this device would prove nothing."""
    import numpy as np
    import torch

    tensor, refused = torch.ones(3, device=far), []
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: tensor.numpy(),
        lambda: np.asarray(tensor),
        lambda: tensor + torch.ones(3),
        lambda: torch.nn.functional.cross_entropy(torch.ones(2, 2, device=far), torch.zeros(2, dtype=torch.long)),
    )
    for attempt in attempts:
        try:
            attempt()
        except (TypeError, RuntimeError) as error:
            refused.append(str(error))
    return refused


def self_tests(job: Any, folder: Path, far: Any) -> list[str]:
    """The checks that did not pass."""
    from trainers.verification.sample import make_context
    from trainers.verification.verify import run_checks

    folder.mkdir()
    return [
        f"{check.name}: {check.detail}"
        for check in run_checks(make_context(job, job.model.path, folder, far))
        if not check.passed
    ]


def opened(job: Any) -> tuple[Any, Any, Any, Any]:
    """The task, the encoder, the training rows and their packs."""
    from tests.tiny import load_written
    from trainers.batching.packing import index_packs
    from trainers.run.record import job_task
    from trainers.shards.dataset import ShardSet
    from trainers.shards.manifest import shards_folder
    from trainers.storage import Folder
    from trainers.tokenizer.encoder import load_encoder

    shards, encoder = load_written(job), load_encoder(job.model.path)
    assert shards is not None
    task = job_task(job, shards.train)
    task.prepare(encoder)
    rows = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, task)
    return task, encoder, rows, index_packs(job, rows)


def losses(job: Any, far: Any) -> list[tuple[float, float]]:
    """The training loss and the length of its gradient, on the host and far away."""
    import torch

    from trainers.model.engine import load_options, prepare_model
    from trainers.model.world import World
    from trainers.training.distill import load_objective

    task, encoder, rows, packs = opened(job)
    batch = task.collate([[rows.row(int(row)) for row in packs.pack(index)] for index in range(3)], encoder.pad_id, 1)
    found = []
    for device in (torch.device("cpu"), far):
        torch.manual_seed(0)
        objective = load_objective(job, task, encoder.pad_id, World(0, 1, device))
        model = prepare_model(task.load_model(job.model.path, pad_id=encoder.pad_id, **load_options(job)), job, task)
        model.to(device)
        torch.manual_seed(1)
        loss = objective.step_loss(model, *batch.to(device), batch.targets(device))
        loss.backward()
        squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
        found.append((float(loss), sum(squares) ** 0.5))
    return found


def waits_of_a_step(job: Any, far: Any) -> list[str]:
    """What the host waits for in the second step, of two micro-batches of three packs each; the first looks once at
    what a model does with its logits."""
    from tests.device.far import waits
    from trainers.batching.batch_plan import BatchPlan
    from trainers.batching.batches import StepSource
    from trainers.batching.order import Order
    from trainers.model.engine import load_options, prepare_model
    from trainers.model.param_groups import parameter_groups
    from trainers.model.plain_engine import PlainEngine
    from trainers.model.world import World
    from trainers.training import loop
    from trainers.training.distill import load_objective

    task, encoder, rows, packs = opened(job)
    world = World(0, 1, far)
    objective = load_objective(job, task, encoder.pad_id, world)
    model = prepare_model(task.load_model(job.model.path, pad_id=encoder.pad_id, **load_options(job)), job, task)
    config = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    engine = PlainEngine(model.to(far).train(), parameter_groups(model, 0.01), {"lr": 1e-3}, config)
    source = StepSource(rows, packs, Order(len(packs), 6, 12, 0), BatchPlan(6, 1, 3, 2), 0, task, encoder.pad_id)
    before = 0
    for step in range(2):
        before = len(waits)
        batch = source.next(step)
        loss_sum = loop.run_micro_batches(engine, objective, batch, world, lambda: None)
        loop._settle(loss_sum / batch.targets, engine.get_global_grad_norm(), 0.0, loop.NOTHING, world)
    source.close()
    return waits[before:]


def evaluations(job: Any, far: Any) -> list[dict[str, float]]:
    """Metrics on the host and far away, generated texts included; short ones, as nothing was trained."""
    import torch

    from tests.device.far import waits
    from tests.tiny import load_written
    from trainers.evaluation import evaluate
    from trainers.run.record import job_task
    from trainers.shards.dataset import ShardSet
    from trainers.shards.manifest import shards_folder
    from trainers.storage import Folder

    shards = load_written(job)
    assert shards is not None
    short = (job.evaluate.generate or GenerateSection()).model_copy(update={"max_new_tokens": 4})
    generates = job.task in ("seq2seq", "sft")
    job = job.model_copy(
        update={"evaluate": job.evaluate.model_copy(update={"generate": short if generates else None})}
    )
    task = job_task(job, shards.train)
    held_out = ShardSet(shards_folder(Folder(job.storage), shards.eval.key), shards.eval, task)
    found = []
    for device in (torch.device("cpu"), far):
        put_on(device)
        torch.manual_seed(0)  # of new heads
        before = len(waits)
        _, scores = evaluate.evaluate_model(job, task, job.model.path, held_out)
        if (len(waits) > before) != (device is far):
            raise AssertionError(f"evaluated elsewhere than on {device}")
        found.append(task.metrics(scores))
    return found


def put_on(device: Any) -> None:
    """Models that are evaluated go to this device, which has room for them."""
    from trainers.evaluation import placement, warm

    placement.pick_device = warm.pick_device = lambda *_: device
    placement.device_memory = lambda _: {"cpu" if device.type == "cpu" else device.index: 1 << 40}


def kept_warm(job: Any, folder: Path, far: Any) -> dict[str, Any]:
    """Evaluations by one process, first on the host and then twice far away: where the weights are in them and between
    them, and whether those far away say the same of the same folder."""
    import torch

    from trainers.evaluation import warm
    from trainers.evaluation.evaluate import score_batches
    from trainers.run.record import find_run

    run, said = find_run(job), []
    path = str(small.with_head(run, folder / "export"))
    on: list[str] = []
    between: set[str] = set()
    for device in ("cpu", far, far):
        put_on(torch.device(device))
        loaded, batches = warm.open_warm(run, path)
        on += sorted({tensor.device.type for tensor in loaded.model.state_dict().values()} | {loaded.device.type})
        said.append(np.concatenate([one["loss_sum"] for one in score_batches(loaded, batches, 0, 1)[""].numbers]))
        warm.keep_warm(run, path, loaded, batches)
        between |= {tensor.device.type for tensor in loaded.model.state_dict().values()}
        warm.load_for_scoring = None  # the others find what they need
    return {"on": on, "between": sorted(between), "alike": bool(np.array_equal(*said[1:]))}


def save(job: Any, folder: Path, far: Any) -> dict[str, Any]:
    """A model far away, copied to host memory, written, exported and opened again: what became of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.checkpoint.export import export_checkpoint
    from trainers.checkpoint.host_buffer import HostBuffer
    from trainers.checkpoint.records import CheckpointState, Save
    from trainers.checkpoint.slices import Piece, RankShare
    from trainers.checkpoint.writing import commit, write_share
    from trainers.storage import Folder
    from trainers.tasks import load_task
    from trainers.tensor_file import TensorSpec

    model: Any = AutoModelForCausalLM.from_pretrained(job.model.path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    logits = model(torch.arange(12)[None]).logits
    weights = {name: parameter.detach() for name, parameter in model.to(far).named_parameters()}
    pieces = tuple(
        Piece(TensorSpec(f"{kind}/{name}", "float32", (weight.numel(),)), weight.flatten, is_fixed=kind == "weight")
        for name, weight in weights.items()
        for kind in ("weight", "exp_avg")
    )
    buffer = HostBuffer(RankShare(pieces, dict.fromkeys(weights, 0)))
    buffer.copy_beside(lambda _: None).wait()
    state = CheckpointState(
        step=1, world_size=1, zero_stage=3, tokens=1, train_key="k", job="j", trainable=tuple(weights),
        shapes={name: list(weight.shape) for name, weight in weights.items()},
    )  # fmt: skip
    checkpoint, out = Folder(str(folder / "checkpoint")), Folder(str(folder / "export"))
    stream = io.BytesIO(buffer._map[:])
    commit(checkpoint, write_share(checkpoint, Save(id="a", rank=0, world_size=1), stream.getbuffer(), 1), 1, state)
    export_checkpoint(checkpoint, out, job, load_task("pretrain"), job.model.path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(out.path))
    changed = [name for name, weight in loaded.named_parameters() if not weight.equal(weights[name].cpu())]
    moved = float((loaded(torch.arange(12)[None]).logits - logits).abs().max())
    return {"changed": changed, "moved": moved, "tied": json.dumps(loaded.config.tie_word_embeddings)}
