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

Written by `python -m tests.architectures.document` from what its tests saw: do not edit the table by hand.

Every family below is made as a tiny model of random weights. In each of its tasks the loss of the first step equals
plain transformers' within 1e-5, packed and not, and no self-test raises an alarm (isolation, padding, packed as
separate, the model class's own loss, reload). `tuneyard plan` says whether a job's family is here; one that is not
may train as well, and `tuneyard verify` tells. `make matrix` runs each through `tuneyard run` with two ZeRO-3
workers; so seen, in a task each:
{commanded}.
The others were not run that way. No model of real size and no GPU takes part in any of this.

In the tests each also trains with ZeRO-3: in full, with adapters and with a frozen layer, packed and not, and each time
the export reloads in plain transformers with every key and the same logits. In full a checkpoint of one or two ranks
goes on at the other size with the same loss (but for families that draw their experts at random), in the other ways too
for {spread}. Which task meets which way turns from family
to family; `make matrix ARGS="--product FAMILY ..."` runs the whole product of some.

- **packing**: what keeps documents of a sequence apart, on a CPU with transformers {transformers}. Bounds: attention
  computes each document by itself, without a mask (`model.attention: documents`, which `auto` comes to here), and so do
  layers that carry a state from token to token (bounds, states); where transformers has its kernels for GPUs
  (causal-conv1d, flash-linear-attention, mamba-ssm) those get the same bounds in one call. Position ids that begin anew
  with each document give attention a mask of blocks. Where documents are not kept apart, `data.packing: null` does not
  pack, and `true` is refused by the self-test of isolation.
- **adapters**: layers that get one by default (`model.lora.target_modules: [all-linear]`), by the last part of their
  names; GPT-2's convolutions of width 1 are among them. The experts of a mixture are no linear layers and stay as they
  are. So does the output projection of Mamba's mixer: on a GPU its weight goes to the mixer's kernel, past an adapter.
- **from GGUF**: whether transformers reads the family's GGUF files (`model.gguf_file`), which are trained as the
  safetensors that they are converted to.
- **to GGUF**, **vLLM**: exports are safetensors under the names that transformers publishes (a test compares them).
  To GGUF: whether llama.cpp's converter ({llama}) took a tiny model's tensors and sizes, or
  why not; its check of the vocabulary was left out, and heads that guess several tokens are not in an export
  (`--no-mtp`). vLLM: what the registry of {vllm} says of the class, which was read and not run: x for code of
  its own, transformers where it runs transformers' code, until where it has dropped it. Both by
  `python -m tests.architectures.served`.
- **refused**: heads that transformers does not have for the family, and packs whose documents would see each other.
- A mixture's balancing loss counts where its configuration sets `output_router_logits`. It is a mean over a
  micro-batch, so it alone depends on how a step is cut up.
- Models of several modalities train their text part; vision and audio are frozen.
- Layers that are dropped at random (M2M-100, NLLB) are drawn from seed and step: the same on every rank and in every
  micro-batch of a step.
- Classification heads of decoders read a row's last token, found by the attention mask. The exported model finds it
  in plain transformers as the last token that is not the padding token, so a text that ends with that token is read
  differently there. XLNet's heads read a row's last place, for its rows are padded on the left: here they get the last
  token, and so they do in plain transformers where its tokenizer pads.
- An empty place in the columns of tasks: the task is for another kind of model, or transformers has no such head for
  the family, and the job is refused in those words.

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
    names = {"spread": ", ".join(SPREAD), "commanded": fill(", ".join(COMMANDED), 119)}
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
