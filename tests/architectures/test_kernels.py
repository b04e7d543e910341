"""Layers that carry a state along, with the kernels that transformers takes for them: a pack's documents are told apart
by the indices that a batch hands over.

The kernels run on GPUs alone; tests/kernels has them in torch, under the names that transformers imports.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOK = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from tests.architectures.single import Samples, keeps_apart, look_at
from trainers.verification import gradients

samples = Samples(Path(sys.argv[1]), "own")
for family in sys.argv[2:]:
    decision = keeps_apart(family, samples)
    cells = [cell for cell in look_at(family, samples, decision) if cell.task == "pretrain"]
    right = [not cell.failed and cell.loss_error <= 1e-5 for cell in cells]
    sample = samples.get("decoder", "pretrain", True)
    by = {"attn_implementation": decision.attention} if decision.attention else {}
    model = sample.task.load_model(
        str(samples.model(family)), pad_id=sample.pad_id, trust_remote_code=False, dtype=torch.float32, **by
    ).train()
    context = replace(sample, model=model)
    pack = gradients.rows_of(context, [0])[0]
    together, *alone = (
        float(gradients.loss_of(context, gradients.collate(context, packs)).detach())
        for packs in ([pack], *([[row]] for row in pack))
    )
    right.append(abs(together - sum(alone)) <= 1e-4 * together)
    rows = [context.shards.row(at) for at in range(len(context.shards))]
    twins = [row for row in rows if len(row.input_ids) == len(rows[0].input_ids)][:2]  # no padding tells them apart
    together, *alone = (
        float(gradients.loss_of(context, gradients.collate(context, packs)).detach())
        for packs in ([[row] for row in twins], *([[row]] for row in twins))
    )
    right.append(len(twins) == 2 and abs(together - sum(alone)) <= 1e-4 * together)
    print("SAW", family, decision.apart, decision.attention, len(pack), right)
"""


ALONE = ("granitemoehybrid", "mamba2")
"""Families whose classes in transformers do not pass all indices on (position ids to the mask, bounds to the mixers):
they go by document instead."""


def test_packs_are_told_apart_by_the_kernels_that_transformers_takes(tmp_path: Path) -> None:
    families = ("lfm2", "qwen3_5_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "falcon_h1", "mamba2")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path), *families],
        capture_output=True, text=True, check=False, env={**environment, "DS_ACCELERATOR": "cpu"}, cwd=ROOT,
    )  # fmt: skip
    seen = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("SAW")]
    assert [family for family, _ in seen] == list(families), done.stderr[-2000:]
    for family, said in seen:
        attention = "documents" if family in ALONE else "None"
        assert said.startswith(f"True {attention} ") and "False" not in said, (family, said)
