"""Tasks of lm-eval on the best checkpoint: metrics reach record, table and registry; offline, with our own task."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.evaluation import task
from orchestrator.evaluation.task import ask_harness
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.register import _record
from orchestrator.report.tables import evaluation_table
from tests.tiny import make_llama, shard_locally, tiny_job, write_rows
from tests.whole_run import answer, result_of, tuneyard
from trainers.errors import JobError
from trainers.evaluation.harness import check_harness, harness_names, is_measured
from trainers.job.schema import Job
from trainers.run.folder import Evaluation, read_evaluations
from trainers.run.record import find_run
from trainers.storage import Folder

TASK = """
task: films
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def films(folder: Path) -> str:
    questions = [{"question": f"the film {i}", "choices": ["the plot", "good"], "answer": i % 2} for i in range(6)]
    rows = write_rows(folder / "rows.jsonl", questions)
    (folder / "films.yaml").write_text(TASK.format(rows=rows))
    return str(folder / "films.yaml")


@pytest.fixture
def job(tmp_path: Path, tiny_chat_tokenizer: Path) -> Job:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    rows = [{"text": f"the film is good {i} the plot"} for i in range(20)]
    made: Job = tiny_job(tmp_path, model, "pretrain", rows, evaluate={"lm_eval": films(tmp_path)})
    shard_locally(made)
    return made


def test_its_metrics_stand_in_record_table_and_registry(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check_harness(job)
    run = find_run(job)
    monkeypatch.setattr(task, "export_step", lambda *_: Folder(job.model.path))  # the pretrained folder for an export
    record = Evaluation(step=6, status="done", metrics={"loss": 3.0}, eval_key=run.shards.eval.key)
    assert not is_measured(job, record.metrics)
    asked = ask_harness(run, record)
    assert read_evaluations(run.folder) == [asked] and is_measured(job, asked.metrics)
    assert 0 <= asked.metrics["acc@films"] <= 1 and (6 * asked.metrics["acc@films"]).is_integer()
    assert "6 rows, standard error" in asked.notes["acc@films"] and asked.metrics["loss"] == 3.0
    low, high = asked.intervals["acc@films"]
    assert low < asked.metrics["acc@films"] < high and high - low < 2
    assert "acc@films" in evaluation_table([asked], "loss", 6).columns
    decision = Promotion(promote=True, reason="")
    registered = _record(job, run.folder, asked, {}, {}, decision)
    assert registered.metrics == asked.metrics and registered.notes == asked.notes
    assert run.job.model_copy(update={"evaluate": run.job.evaluate.model_copy(update={"lm_eval": ()})}).identity() == (
        job.identity()
    )


def test_what_cannot_be_asked_is_refused_before_anything_starts(job: Job, tmp_path: Path) -> None:
    def asking(*tasks: str, **more: Any) -> Job:
        evaluate = job.evaluate.model_copy(update={"lm_eval": tasks})
        return job.model_copy(update={"evaluate": evaluate, **more})

    with pytest.raises(JobError, match="its tasks ask causal models, and classify trains none"):
        check_harness(asking("films", task="classify"))
    pytest.importorskip("lm_eval")
    with pytest.raises(JobError, match=r"none.yaml cannot be read"):
        check_harness(asking(f"{tmp_path}/none.yaml"))
    (tmp_path / "empty.yaml").write_text("group: x\n")
    with pytest.raises(JobError, match="has no line `task: NAME`"):
        check_harness(asking(f"{tmp_path}/empty.yaml"))
    assert harness_names(["arc_easy", films(tmp_path)]) == {"arc_easy": "arc_easy", f"{tmp_path}/films.yaml": "films"}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_a_whole_run_asks_the_task_and_its_number_is_the_harness_own(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the job file to the registered version by `tuneyard run`, then lm-eval called directly on the folder."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"the film is good {i} the plot"} for i in range(40)]
    more = {"evaluate": {"lm_eval": films(tmp_path)}, "train": {"verify": False, "steps": 3}}
    job = tiny_job(tmp_path, make_llama(tmp_path / "model", tiny_chat_tokenizer), "pretrain", rows, **more)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    done = tuneyard("run", str(tmp_path / "job.yaml"))
    assert done.returncode == 0, done.stderr
    (version,) = answer("registry", "show", "tiny", "--storage", job.storage)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = HFLM(pretrained=version["source"], device="cpu", dtype="float32")
    direct = lm_eval.simple_evaluate(model=model, tasks=["films"], task_manager=manager)["results"]["films"]
    assert version["metrics"]["acc@films"] == direct["acc,none"]
    (best,) = [one for one in result_of(Path(version["run"]))["evaluations"] if one["step"] == version["step"]]
    spread = direct["acc_stderr,none"]
    ends = [direct["acc,none"] + sign * 1.96 * spread for sign in (-1, 1)]
    assert best["intervals"]["acc@films"] == pytest.approx(ends)
