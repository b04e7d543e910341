"""What a step costs, in counts that no busy machine moves: operators, floating point operations and bytes of results,
each against a loop as everybody writes it, on the same tokens in the same process."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
ATEN = torch.ops.aten
FORWARD, BACKWARD = 2 * 2, 5 * 2
"""Products of length x length x width that attention takes, two operations each."""


def product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return int(FORWARD * torch.Size(query).numel() * key[2])


def attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return int(BACKWARD * torch.Size(query).numel() * key[2])


UNKNOWN = {
    ATEN.addmm_: product,
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""Operators that torch's counter does not know."""
LENGTH, ROWS, VOCABULARY = 256, 4, 8192


class Counted(TorchDispatchMode):
    """Operators that ran, and bytes of what they made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        made = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree_leaves(result)
                if isinstance(leaf, torch.Tensor)}  # fmt: skip
        self.bytes += sum(size for storage, size in made.items() if storage not in known)
        return result


def costs_of(step: Any) -> tuple[int, int, int]:
    """Operators, bytes and floating point operations of the second step."""
    step()
    counted, flops = Counted(), FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    with counted:
        step()
    with flops:
        step()
    return counted.operators, counted.bytes, flops.get_total_flops()


def look(folder: str, documents: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Costs of our step on packs of so many documents each, and of the hand-written loop on whole rows."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    import trainers.architecture.document_attention  # noqa: F401
    from trainers.batching.batches import StepBatch
    from trainers.model.param_groups import parameter_groups
    from trainers.model.plain_engine import PlainEngine
    from trainers.model.world import join_world
    from trainers.tasks import Example, TaskOptions, load_task
    from trainers.training.loop import run_micro_batches

    world = join_world(1, 0)

    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=128, **sizes)).train()

    ids = np.random.default_rng(0).integers(3, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    packs = [[Example(0, part, {}) for part in np.split(row, documents)] for row in ids]
    task = load_task("pretrain", TaskOptions(packing=True))
    ours = model()
    ours.set_attn_implementation("documents")
    config = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
    engine = PlainEngine(ours, parameter_groups(ours, 0.01), {"lr": 1e-3, "fused": True}, config)
    batch = StepBatch((task.collate(packs, 0),), ROWS * (LENGTH - documents), ROWS * LENGTH)

    theirs = model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    tokens = torch.from_numpy(ids.astype(np.int64))

    def by_hand() -> None:
        theirs(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return costs_of(lambda: run_micro_batches(engine, task, batch, world, lambda: None)), costs_of(by_hand)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = str(tmp_path_factory.mktemp("costs"))
    return {count: run_ranks(look, 1, folder, count)[0] for count in (1, 8)}


def test_a_step_runs_hardly_more_operators_than_a_loop_by_hand(costs: dict[int, Any]) -> None:
    ours, theirs = (side[0] for side in costs[1])
    assert ours <= 1.25 * theirs


def test_a_step_makes_no_more_bytes_than_a_loop_by_hand(costs: dict[int, Any]) -> None:
    ours, theirs = (side[1] for side in costs[1])
    assert ours <= 0.52 * theirs, "the loss makes no copy of all logits"


def test_a_step_computes_what_a_loop_by_hand_computes(costs: dict[int, Any]) -> None:
    ours, theirs = (side[2] for side in costs[1])
    assert ours == pytest.approx(theirs, rel=0.02)


def test_packed_documents_cost_less_arithmetic_than_whole_rows(costs: dict[int, Any]) -> None:
    """By seven eighths of what attention takes of a step, and by each document's first token, which is no target."""
    whole, packed = costs[1][0][2], costs[8][0][2]
    work = 2 * ROWS * 4 * LENGTH**2 * 16 * (FORWARD + BACKWARD)
    head = 3 * 2 * 64 * VOCABULARY * ROWS * 7
    assert whole - packed == pytest.approx(work * 7 / 8 + head, rel=0.01)
