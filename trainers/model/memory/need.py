"""What a rank needs of memory, by the way the state is kept. Pure; begin at `needs`. Sizes come from `model_size`.

A step has moments that are full of different things: of activations when the layers have run, of logits at the loss, of
copies of gradients when they are reduced, of fp32 gradients at the update. What counts is the fullest.
"""

from dataclasses import dataclass

from trainers.model.memory.beyond import offloaded, on_disk
from trainers.model.memory.held import parted, plain, sharded
from trainers.model.memory.shape import ModelSize, StepShape

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""CUDA context, libraries' workspaces and what collectives hold."""
MARGIN = 0.08
"""Share of activations and state that an allocator loses to fragments."""
CPU_IMPORT_BYTES, CPU_RESERVE_BYTES = 560 * 2**20, 68 * 2**20
"""What a rank on a CPU takes besides tensors: imports; then code that is read in as it first runs, workspaces of
kernels and of gloo. Measured with a model of 0.3 million parameters."""
CPU_KERNELS_BYTES = 44 * 2**20
"""Where weights have 16 bits, kernels that oneDNN makes for the shapes it meets (`world.KERNELS_KEPT`), at their
largest: for processors with AMX."""
CPU_MARGIN, GIVE_BACK_BYTES = 0.05, 64 * 2**10
"""The same as MARGIN, where the C library gives freed tensors of so many bytes back at once."""
SAVED_BYTES = 12
"""A parameter's weight and moments in fp32, as checkpoints hold them."""


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs of a rank at the fullest moment of a step."""

    way: str
    moment: str
    weights: int
    """Those of a teacher too."""
    gradients: int
    optimizer: int
    """fp32 masters and the two moments."""
    working: int
    """What gathers, reductions and the update hold for a while."""
    activations: int
    logits: int
    """Logits over a vocabulary, or what the loss holds in their place."""
    staging: int
    """Of host memory: what checkpoints are copied to, from the start of a run to its end."""
    host: int
    """State that is kept in host memory, and what layers keep there; staging apart."""
    disk: int
    """State that is kept on the node's disk."""
    state: int
    """Weights, all gradients and the optimizer, on the device."""
    on_card: bool = True
    kernels: int = 0
    """Of the host, where it computes in 16 bits."""

    @property
    def counted(self) -> int:
        """What tensors take of the device at that moment; on a CPU all is in one memory."""
        tensors = self.weights + self.gradients + self.optimizer + self.working + self.activations + self.logits
        return tensors if self.on_card else tensors + self.staging + self.host

    @property
    def reserve(self) -> int:
        """What is no tensor; on a CPU beside what was imported."""
        return RESERVE_BYTES if self.on_card else CPU_RESERVE_BYTES + self.kernels

    @property
    def margin(self) -> int:
        """For fragments, and what is no tensor."""
        share, imported = (MARGIN, 0) if self.on_card else (CPU_MARGIN, CPU_IMPORT_BYTES)
        return int(self.counted * share) + imported + self.reserve

    @property
    def device(self) -> int:
        """Of the device in all; on a CPU of the memory that a rank has to itself."""
        return self.counted + self.margin


def needs(size: ModelSize, world_size: int, step: StepShape, on_card: bool = True) -> tuple[Need, ...]:
    """What each way needs, the cheapest way first.

    Args:
        on_card: ranks compute on GPUs; else on CPUs, where a buffer takes what was written to it, and gloo reduces in a
            copy.
    """
    ways = {
        "zero0": plain(size, world_size, step),
        "zero1": parted(size, world_size, step, on_card, 1),
        "zero2": parted(size, world_size, step, on_card, 2),
        "zero3": sharded(size, world_size, step, on_card),
        "zero3-cpu-offload": offloaded(size, world_size, step, on_card),
        "zero3-nvme-offload": on_disk(size, world_size, step, on_card),
    }
    kept, logits, again = size.kept_bytes(step), size.loss_bytes(step, on_card), size.again_bytes(step)
    on_host = size.inputs_bytes(step) if step.offload else 0
    saved = SAVED_BYTES * size.trainable // world_size + size.saved_frozen_bytes
    kernels = CPU_KERNELS_BYTES if size.weight_bytes == 2 and not on_card else 0
    found = []
    for way, held in ways.items():
        moments = {  # gradients, working memory, activations, logits
            "layers": (held.before, held.always + held.gathered + held.ahead, kept, 0),
            "loss": (held.before, held.always + held.gathered, kept, logits),
            "backward": (held.before, held.always + held.buckets + held.gathered, kept + again, 0),
            "first layer": (held.before, held.always + held.buckets + held.arriving, again, 0),
            "reduction": (
                held.before,
                held.always + held.buckets + held.reduced + int(held.early * held.gathered),
                int(held.early * kept),
                0,
            ),
            "update": (0, held.always + held.update, 0, 0),
        }
        moment = max(moments, key=lambda name: sum(moments[name]))
        gradients, working, activations, loss = moments[moment]
        weights = held.weights + size.teacher_bytes
        state = weights + held.optimizer + held.complete
        staging = 0 if held.host else saved  # offloaded state is written from where it lies
        found.append(Need(way, moment, weights, gradients, held.optimizer, working, activations, loss, staging,
                          held.host + on_host, held.disk, state, on_card, kernels))  # fmt: skip
    return tuple(found)
