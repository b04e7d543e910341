"""How many messages a step takes and how many bytes, at each ZeRO stage, counted in two gloo ranks: against theory
(Rajbhandari et al. 2020, arXiv:1910.02054), and with DeepSpeed's own settings beside those from the model's sizes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
LAYERS, EXPERTS = 6, 4
DATA_PARALLEL = 2.0
"""Times its parameters' bytes that each rank sends in a step."""
DEEPSPEED_OWN = {"use_multi_rank_bucket_allreduce": True}
FORGETFUL = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
"""Weights are let go after each use, as those of a large model are,"""
SHORT = {**FORGETFUL, "stage3_max_live_parameters": 0}
"""and none is gathered ahead."""


@dataclass(frozen=True)
class Case:
    """One engine: zero_optimization as a file says it, micro-batches a step, whether others pass before it trains."""

    zero: dict[str, Any]
    parts: int = 1
    beside: bool = False
    model: str = "dense"


@dataclass(frozen=True)
class Step:
    """What the step after four others took."""

    counts: dict[str, int]
    sent: float
    """Times the bytes of the parameters."""
    loss: float
    fetches: int = 0
    """Modules whose weights ZeRO-3 looked for."""

    @property
    def messages(self) -> int:
        return sum(self.counts.values())


CASES = {
    "zero0": Case({"stage": 0}),
    "zero0 x3": Case({"stage": 0}, 3),
    **{f"zero{stage}": Case({"stage": stage}) for stage in (1, 2, 3)},
    **{f"zero{stage} x3": Case({"stage": stage}, 3) for stage in (1, 2, 3)},
    **{f"zero{stage} as it comes": Case({"stage": stage, **DEEPSPEED_OWN}) for stage in (1, 2)},
    "zero3 short": Case({"stage": 3, **SHORT}),
    "zero3 short x3": Case({"stage": 3, **SHORT}, 3),
    "zero3 looked at": Case({"stage": 3, "stage3_param_persistence_threshold": 0}, 3, beside=True),
    "zero3 whole": Case({"stage": 3, "stage3_param_persistence_threshold": 0}, 3),
    "by layers": Case({"stage": 3, **FORGETFUL}),
    "by little": Case({"stage": 3, **FORGETFUL, "stage3_prefetch_bucket_size": 3000, "reduce_bucket_size": 3000}),
    "experts": Case({"stage": 3, **SHORT}, model="mixture"),
    "experts by parts": Case({"stage": 3, **SHORT, "leaf_module": {"classes": []}}, model="mixture"),
}  # fmt: skip


def make_models(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    sizes = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": LAYERS, "intermediate_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "dense")
    mixture = OlmoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2, tie_word_embeddings=False)
    OlmoeForCausalLM(mixture).save_pretrained(folder / "mixture")


def look(folder: str) -> dict[str, Step]:
    """Each case's step."""
    from trainers.model import zero_settings
    from trainers.model.engine import release_engine
    from trainers.model.world import join_world

    world = join_world(1, 0)
    # as if these few thousand weights were a large model's
    zero_settings.LEAST_BUCKET = zero_settings.PREFETCH = zero_settings.LEAST_SHARE = 1
    found = {}
    for name, case in CASES.items():
        engine = engine_of(Path(folder), case, world)
        found[name] = fifth_step(engine, case, world)
        if case.zero["stage"]:
            release_engine(engine)
    return found


def engine_of(folder: Path, case: Case, world: Any) -> Any:
    from trainers.batching.batch_plan import plan_batches
    from trainers.job.load import parse_job
    from trainers.model.deepspeed_config import derive_config
    from trainers.model.engine import build_engine
    from trainers.tasks import load_task

    file = folder / f"{world.rank}.json"
    file.write_text(json.dumps({"zero_optimization": case.zero}), encoding="utf-8")
    train = {"global_batch_size": world.size * case.parts, "micro_batch_size": 1, "steps": 1, "learning_rate": 1e-3}
    raw = {"name": "t", "task": "pretrain", "data": {"train": ["x.txt"], "eval": ["x.txt"]},
           "model": {"path": str(folder / case.model), "dtype": "float32"},
           "train": {**train, "deepspeed": str(file)}}  # fmt: skip
    job = parse_job(raw)
    batches = plan_batches(world.size * case.parts, 1, world.size, 64)
    return build_engine(job, load_task("pretrain"), job.model.path, 0, derive_config(job, batches), world)


def fifth_step(engine: Any, case: Case, world: Any) -> Step:
    import torch
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from tests.trainers.training.messages import Messages
    from trainers.model.zero_passes import beside_training

    torch.manual_seed(world.rank)
    ids = torch.randint(3, 500, (1, 24))
    fetched: list[Any] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noted(*given: Any, **named: Any) -> Any:
        fetched.append(given)
        return fetch(*given, **named)

    def step() -> float:
        for part in range(case.parts):
            engine.set_gradient_accumulation_boundary(part == case.parts - 1)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss / case.parts, scale_wrt_gas=False)
            engine.step()
        return float(loss.detach())

    if case.beside:
        with torch.no_grad(), beside_training(engine):
            for _ in range(4):
                engine(input_ids=ids)
    for _ in range(4):
        step()
    bytes_of_all = 4 * sum(getattr(each, "ds_numel", each.numel()) for each in engine.parameters())
    PartitionedParameterCoordinator.fetch_sub_module = noted
    try:
        with Messages() as seen:
            loss = step()
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = fetch
    return Step(dict(seen.counts), seen.bytes / bytes_of_all, loss, len(fetched))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    folder = tmp_path_factory.mktemp("messages")
    make_models(folder)
    first, second = run_ranks(look, 2, str(folder))
    assert {name: step.counts for name, step in first.items()} == {name: step.counts for name, step in second.items()}
    found: dict[str, Step] = first
    return found


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("zero0", DATA_PARALLEL),
        ("zero0 x3", DATA_PARALLEL),
        ("zero1", DATA_PARALLEL),
        ("zero1 x3", DATA_PARALLEL),
        ("zero2", DATA_PARALLEL),
        ("zero2 x3", 3 + 1),
        ("zero3 short", 1.5 * DATA_PARALLEL),
        ("zero3 short x3", 3 * 1.5 * DATA_PARALLEL),
        ("zero3 whole", 3 * DATA_PARALLEL),
    ],
)
def test_each_rank_sends_what_theory_says(steps: dict[str, Step], name: str, sent: float) -> None:
    from trainers.model.zero_settings import sent_bytes

    case = CASES[name]
    assert steps[name].sent == pytest.approx(sent, rel=0.01)
    assert sent_bytes(case.zero["stage"], 1, 1, case.parts, "short" not in name) == sent


def test_losses_do_not_depend_on_settings(steps: dict[str, Step]) -> None:
    dense = {name: step.loss for name, step in steps.items() if CASES[name].model == "dense"}
    assert list(dense.values()) == pytest.approx([dense["zero0"]] * len(dense), rel=1e-6)
    assert steps["experts"].loss == pytest.approx(steps["experts by parts"].loss, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_part_of_its_own_for_each_rank_is_a_third_less(steps: dict[str, Step], stage: int) -> None:
    """Stages 1 and 2 as DeepSpeed sets them send every gradient to every rank."""
    assert steps[f"zero{stage}"].sent == pytest.approx(steps[f"zero{stage} as it comes"].sent * 2 / 3, rel=0.01)


def test_passes_beside_the_training_cost_its_steps_nothing(steps: dict[str, Step]) -> None:
    """They taught DeepSpeed to let go of each weight after the forward pass, and to gather each by itself."""
    assert steps["zero3 looked at"].counts == steps["zero3 whole"].counts
    assert steps["zero3 whole"].counts["allgather"] == pytest.approx(3 * LAYERS, abs=6), "one a layer"


def test_a_message_holds_a_layer(steps: dict[str, Step]) -> None:
    layers, little = steps["by layers"].counts, steps["by little"].counts
    assert layers["allgather"] <= 0.5 * little["allgather"]
    assert layers["reduce_scatter"] <= 0.5 * little["reduce_scatter"]
    assert layers["reduce_scatter"] == pytest.approx(LAYERS, abs=2)


def test_experts_are_fetched_as_one(steps: dict[str, Step]) -> None:
    ours, parts = steps["experts"], steps["experts by parts"]
    assert ours.fetches <= parts.fetches - 2 * LAYERS
    assert ours.messages <= parts.messages
