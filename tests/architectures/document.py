"""Writes docs/models.md and trainers/model/families.json from what the matrix saw.

`python -m tests.architectures.document`, or `make models`.
"""

import json
import tempfile
from pathlib import Path

import transformers

from tests.architectures.families import FAMILIES, unlisted
from tests.architectures.matrix import Matrix, run_matrix
from tests.architectures.single import Cell

ROOT = Path(__file__).parents[2]
DOCUMENT, TESTED = ROOT / "docs" / "models.md", ROOT / "trainers" / "model" / "families.json"
REFUSED = ("xlnet",)
"""Families that a self-test refuses, rightly: padding stands on their left."""
TASKS = ("pretrain", "sft", "mlm", "classify", "tag", "extract", "seq2seq", "similarity")
NAMES = {"regression": "similarity", "cosine": "similarity"}
HEAD = """# Models

Written by `python -m tests.architectures.document` from what its tests saw: do not edit the table by hand.

Every family below is made as a tiny model of random weights. In each of its tasks the loss of the first step equals
plain transformers' within 1e-5, packed and not, and no self-test raises an alarm (isolation, padding, packed as
separate, the model class's own loss, reload). `tuneyard plan` says whether a job's family is here; one that is not
may train as well, and `tuneyard verify` tells. `make matrix` runs each through `tuneyard run` with two ZeRO-3
workers.

- **packs**: whether documents of a sequence are kept apart, on a CPU with transformers {transformers}. Where they are
  not, `data.packing: null` does not pack, and `true` is refused. "with kernels": layers that carry a state along
  (Qwen3-Next, LFM2, Mamba) keep documents apart where their kernels are installed, which only GPUs have; `tuneyard
  plan` names the package.
- **Adapters** go beside every linear layer (`model.lora.target_modules: [all-linear]`), GPT-2's convolutions of width
  1 included. Experts of a mixture are no linear layers and stay as they are.
- A mixture's balancing loss counts where its configuration sets `output_router_logits`. It is a mean over a
  micro-batch, so it alone depends on how a step is cut up.
- Models of several modalities train their text part; vision and audio are frozen.
- Layers that are dropped at random (M2M-100, NLLB) are drawn from seed and step: the same on every rank and in every
  micro-batch of a step.
- Classification heads of decoders read a row's last token, found by the attention mask. The exported model finds it
  in plain transformers as the last token that is not the padding token, so a text that ends with that token is read
  differently there.
- A GGUF file is trained as the safetensors that it is converted to. Exports are safetensors under the published names.

"""


def read_tested(matrix: Matrix) -> dict[str, list[str]]:
    """Tasks that each family passed."""
    tested: dict[str, list[str]] = {}
    for family in FAMILIES:
        own = [cell for cell in matrix.cells if cell.family == family]
        failed = {NAMES.get(cell.task, cell.task) for cell in own if cell.failed}
        passed = {NAMES.get(cell.task, cell.task) for cell in own if _passed(cell)} - failed
        if passed:
            tested[family] = [task for task in TASKS if task in passed]
    return tested


def _passed(cell: Cell) -> bool:
    return not cell.refused and not cell.failed and (cell.loss_error or 0.0) <= 1e-5


def rows_of_document(matrix: Matrix) -> list[str]:
    """The table's lines."""
    lines = [f"| family | {' | '.join(TASKS)} | packs |", "| --- |" + " :-: |" * len(TASKS) + " --- |"]
    tested = read_tested(matrix)
    for family in FAMILIES:
        marks = ["x" if task in tested.get(family, ()) else "" for task in TASKS]
        why = matrix.apart.get(family)
        packs = "" if why is None else "yes" if not why else "no" if "moves" in why else "with kernels"
        if family in REFUSED:
            packs = "heads that read a row's end are refused: its padding stands on the left"
        lines.append(f"| {family} | {' | '.join(marks)} | {packs} |")
    count = len(unlisted())
    lines.append(
        f"| {count} more families of transformers {transformers.__version__} are not listed |" + " |" * (len(TASKS) + 1)
    )
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        matrix = run_matrix(Path(folder))
    for cell in matrix.cells:
        if cell.failed or (cell.loss_error or 0.0) > 1e-5:
            print("ALARM", cell)
    head = HEAD.replace("{transformers}", transformers.__version__)
    DOCUMENT.write_text(head + "\n".join(rows_of_document(matrix)) + "\n", encoding="utf-8")
    TESTED.write_text(json.dumps(read_tested(matrix), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
