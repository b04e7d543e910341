"""Where a model comes from, as flat text that a registry can hold: data, job, code, libraries, seed.

Nothing is read from the environment, so no secret of it can end up in a registry.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from trainers.credentials import hide_credentials
from trainers.job.schema import Job
from trainers.run.continued import Ancestor, told_line
from trainers.shards.manifest import ShardManifest, Shards
from trainers.training.divergence import SkippedSteps

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "ray", "pyarrow", "numpy", "scikit-learn", "mlflow")


def lineage(
    job: Job, shards: Shards, model_digest: str, skipped: SkippedSteps, line: tuple[Ancestor, ...] = ()
) -> dict[str, str]:
    """What a registered version says of its making: everything needed to make it again.

    Args:
        skipped: steps that the run left out because their loss diverged.
        line: the runs that trained the steps before it began, the oldest first.
    """
    metric = job.evaluate.metric
    left_out = "; ".join(f"step {one.step + 1}: {one.reason}, {len(one.rows)} rows" for one in skipped.steps)
    return {
        "job": resolved_yaml(job),
        "job.identity": job.identity(),
        "model.digest": model_digest,
        "model.path": hide_credentials(job.model.path),
        "seed": str(job.train.seed),
        **_data("train", shards.train),
        **_data("eval", shards.eval),
        **{key: value for held in shards.beside.values() for key, value in _data(held.split, held).items()},
        **({"evaluate.metric": metric} if metric else {}),
        **({"train.skipped": left_out} if left_out else {}),
        **({"train.continued": "; ".join(told_line(line))} if line else {}),
        **versions(),
        **code(),
    }


def resolved_yaml(job: Job) -> str:
    """The job as it ran, every default written out, credentials of URIs left out."""
    text: str = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return hide_credentials(text)


def versions() -> dict[str, str]:
    """Python and library versions, without importing the libraries."""
    return {"version.python": platform.python_version(), **{f"version.{name}": _version(name) for name in LIBRARIES}}


def code() -> dict[str, str]:
    """Version of this program and, where it runs from a checkout of its own, the commit and whether files differ."""
    here = Path(__file__).resolve()
    known = {"code.version": _version("tuneyard")}
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return known
    commit, changes = _git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain", "--untracked-files=no")
    return {**known, "code.commit": commit or "unknown", "code.modified": str(bool(changes)).lower()}


def _data(split: str, manifest: ShardManifest) -> dict[str, str]:
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(manifest.outcomes.items()))
    return {
        f"data.{split}.key": manifest.key,
        f"data.{split}.rows_in": str(manifest.rows_in),
        f"data.{split}.sequences": str(manifest.total("rows")),
        f"data.{split}.tokens": str(manifest.total("tokens")),
        f"data.{split}.tokens_lost": str(manifest.total("tokens_lost")),
        f"data.{split}.ledger": outcomes,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(file: Path, *arguments: str) -> str | None:
    """Output of git beside a file, None where git or the checkout is missing or refuses."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
