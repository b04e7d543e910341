"""Writes docs/models.md and trainers/model/families.json from what the matrix saw.

`python -m tests.architectures.document`, or `make models`.
"""

import json
import tempfile
from pathlib import Path
from textwrap import fill

import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from tests.architectures.families import FAMILIES, unlisted
from tests.architectures.matrix import Matrix, run_matrix
from tests.architectures.served import served
from tests.architectures.single import Cell
from tests.architectures.trials import SPREAD
from trainers.verification.packing import PackingDecision

ROOT = Path(__file__).parents[2]
DOCUMENT, TESTED = ROOT / "docs" / "models.md", ROOT / "trainers" / "model" / "families.json"
COMMANDED = (
    *("gpt2", "opt", "falcon", "gemma2", "gemma3", "apertus", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_moe"),
    *("qwen3_5", "mamba2", "modernbert", "deberta-v2", "xlnet", "t5", "m2m_100", "pegasus"),
)
"""Families that went through `make matrix` by hand, which takes half a minute each."""
TASKS = ("pretrain", "sft", "mlm", "classify", "tag", "extract", "seq2seq", "similarity")
NAMES = {"regression": "similarity", "cosine": "similarity"}
HEAD = """# Models

Written by `python -m tests.architectures.document` from the results of its tests: do not edit this page by hand.

The table shows which model families are tested, and for which tasks. `tuneyard plan` says whether a job's family is in
it. A family that is not in it may train as well; `tuneyard verify` tests it. No model of real size and no GPU takes
part in these tests.

- **Losses.** Each family is built as a tiny model with random weights. In each of its tasks the loss of the first step
  equals that of plain transformers within 1e-5, packed and not. No self-test fails (isolation, padding, packed as
  separate, the model class's own loss, reload).
- **Training with ZeRO-3.** Each family trains in full, with adapters and with a frozen layer, packed and not. Each time
  the export reloads in plain transformers with every key and the same logits. Not every task is run in every way; the
  pairs differ between families. `make matrix ARGS="--product FAMILY ..."` runs all pairs for some families.
- **Resuming.** After full training a checkpoint of one rank resumes on two, or of two on one, with the same loss
  (except for families that draw their experts at random). In the other ways of training this is tested only for
  {spread}.
- **The whole program.** `make matrix` runs each family through `tuneyard run` with two ZeRO-3 workers. This was done,
  in one task each, only for
  {commanded}.

The columns of the table:

- **Tasks** (`pretrain` to `similarity`): an empty cell means that the task is for another kind of model, or that
  transformers has no such head for the family. Such a job is refused with this reason.
- **packing**: what separates the documents of a sequence, on a CPU with transformers {transformers}.
  - *bounds*: attention computes each document separately, without a mask (`model.attention: documents`, which `auto`
    chooses here). *bounds, states*: layers that carry a state from token to token do so too. If transformers has its
    kernels for GPUs (causal-conv1d, flash-linear-attention, mamba-ssm), they get the same bounds in one call.
  - *position ids*: they begin again with each document, and attention makes a mask of blocks from them.
  - *not kept apart*: `data.packing: null` does not pack, and `true` is refused by the self-test of isolation.
- **adapters**: layers that get one by default (`model.lora.target_modules: [all-linear]`), by the last part of their
  names. GPT-2's convolutions of width 1 are among them. The experts of a mixture are not linear layers and get none.
  Mamba's output projection gets none either: on a GPU its weight is passed to the mixer's kernel, without the adapter.
- **from GGUF**: whether transformers reads the family's GGUF files (`model.gguf_file`). They are converted to
  safetensors before training.
- **to GGUF**: exports are safetensors under the names that transformers publishes (a test compares them). The column
  shows whether llama.cpp's converter ({llama}) accepted a tiny model's tensors and sizes, or why not.
  Its check of the vocabulary was left out. Heads that predict several tokens are not in an export (`--no-mtp`).
- **vLLM**: what the registry of {vllm} says about the class; it was read, not run. *x*: vLLM has its own code.
  *transformers*: it runs transformers' code. *until*: vLLM dropped it after that version. Both this column and the
  one before come from `python -m tests.architectures.served`.
- **refused**: heads that transformers does not have for the family, and packing if documents would see each other.

Notes:

- A mixture's balancing loss is used if its configuration sets `output_router_logits`. It is a mean over a micro-batch,
  so it is the only loss that depends on how a step is cut into micro-batches.
- Models of several modalities train their text part; vision and audio are frozen.
- Layers that are dropped at random (M2M-100, NLLB) are drawn from seed and step: the same on every rank and in every
  micro-batch of a step.
- Classification heads of decoders read a row's last token, found by the attention mask. In plain transformers the
  exported model takes the last token that is not the padding token. So a text that ends with the padding token is read
  differently there.
- XLNet's heads read a row's last position, because its rows are padded on the left. Here they get the last token, and
  also in plain transformers if its tokenizer pads.

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


def document_of(matrix: Matrix) -> str:
    """docs/models.md."""
    names = {"spread": ", ".join(SPREAD), "commanded": fill(", ".join(COMMANDED), 117, subsequent_indent="  ")}
    names |= {"vllm": served()["vllm"], "llama": served()["llama.cpp"]}
    head = HEAD.format(transformers=transformers.__version__, **names)
    return head + "\n".join(_rows(matrix)) + "\n"


def _rows(matrix: Matrix) -> list[str]:
    lines = [f"| family | {' | '.join(TASKS)} | packing | adapters | from GGUF | to GGUF | vLLM | refused |"]
    lines.append("| --- |" + " :-: |" * len(TASKS) + " --- | --- | :-: | --- | --- | --- |")
    tested, readable, known = read_tested(matrix), GGUF_CONFIG_MAPPING.keys(), served()["families"]
    for family in FAMILIES:
        marks = ["x" if task in tested.get(family, ()) else "" for task in TASKS]
        packing = _packing(matrix.packing.get(family), family in matrix.stateful)
        gguf = "x" if family.removesuffix("_text") in readable else ""
        cells = [family, *marks, packing, ", ".join(matrix.adapted[family]), gguf, known[family]["gguf"] or "x"]
        cells += [_vllm(known[family]["vllm"]), _refused(matrix, family)]
        lines.append(f"| {' | '.join(cells)} |")
    count = len(unlisted())
    lines.append(f"| {count} more families of transformers {transformers.__version__} are not listed |" + " |" * 14)
    return lines


def _vllm(words: dict[str, str]) -> str:
    """What vLLM says of a family's heads, those of one word together."""
    heads: dict[str, list[str]] = {}
    for head, word in words.items():
        heads.setdefault("x" if word == "own" else word, []).append(head)
    return "; ".join(word if heads[word] == ["texts"] else f"{word} ({', '.join(heads[word])})" for word in heads)


def _refused(matrix: Matrix, family: str) -> str:
    """Tasks that are refused, by the reason."""
    own = [cell for cell in matrix.cells if cell.family == family and cell.refused]
    assert all(" head for a" in cell.refused for cell in own), own
    heads = sorted({NAMES.get(cell.task, cell.task) for cell in own})
    decision = matrix.packing.get(family)
    packs = ["packing"] * (decision is not None and not decision.apart)
    return "; ".join([f"no head: {', '.join(heads)}"] * bool(heads) + packs)


def _packing(decision: PackingDecision | None, has_states: bool) -> str:
    """What keeps a family's documents apart; None where the family's tasks do not pack."""
    if decision is None:
        return ""
    if not decision.apart:
        return "not kept apart"
    return "position ids" if not decision.attention else "bounds, states" if has_states else "bounds"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        matrix = run_matrix(Path(folder))
    for cell in matrix.cells:
        if cell.failed or (cell.loss_error or 0.0) > 1e-5:
            print("ALARM", cell)
    DOCUMENT.write_text(document_of(matrix), encoding="utf-8")
    TESTED.write_text(json.dumps(read_tested(matrix), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
