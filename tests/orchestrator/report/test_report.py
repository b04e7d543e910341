"""The report: one page that stands alone, tells the truth about the run and lets no text become markup."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from orchestrator.commands.status import run_status
from orchestrator.report.details import Details, gather
from orchestrator.report.index import write_index
from orchestrator.report.memory import by_rank, memory_table
from orchestrator.report.page import render_report
from orchestrator.report.plots import draw_curves
from orchestrator.report.tables import evaluation_table, table_by_class
from tests.tiny import make_llama, shard_locally, tiny_job
from trainers.evaluation.row_views import RowView
from trainers.job.load import parse_job
from trainers.model.source import ModelFolder
from trainers.run.describe import duration
from trainers.run.events import StepEvent, parse_events, steps_of
from trainers.run.folder import Evaluation, RegisteredVersion, RunResult
from trainers.run.record import run_of
from trainers.run.row_scores import write_row_scores
from trainers.shards.manifest import ShardManifest, ShardRecord, Shards
from trainers.storage import Folder

EVIL = "<script>alert('x')</script>"


def job_of(**change):
    raw = {
        "name": "topics",
        "task": "classify",
        "model": {"path": "some/model"},
        "data": {"train": ["s3://key:verysecret@bucket/train.jsonl"], "eval": ["/data/eval.jsonl"]},
        "train": {"global_batch_size": 32, "steps": 50, "learning_rate": 1.0e-4},
        "storage": "/shared/runs",
    }
    return parse_job(raw | change)


def events_of(steps=100):
    """A run that was killed at 60 % and taken up again at 50 %."""
    order = [*range(1, int(steps * 0.6)), *range(steps // 2 + 1, steps + 1)]
    random, events = np.random.default_rng(0), [{"kind": "start", "time": 0.0, "step": 0, "world_size": 2}]
    for time, step in enumerate(order):
        if time and step <= order[time - 1]:
            events.append({"kind": "start", "time": float(time), "step": step - 1, "world_size": 2})
        events.append(
            {
                "kind": "step",
                "time": float(time),
                "step": step,
                "loss": float(2.2 * np.exp(-step / 40) + 0.15 * random.random()),
                "learning_rate": 1e-4 * min(1, step / 10) * (1 - step / steps),
                "grad_norm": float(1 + random.random()),
                "tokens_per_s": float(4000 + 500 * random.random()),
            }
        )
    return parse_events(json.dumps(event).encode() for event in events)


def shards_of(labels=("ai", "coding", EVIL)):
    def manifest(split, rows):
        shard = ShardRecord(
            file="f",
            source=0,
            ledger="l",
            unit="u",
            rows=rows,
            tokens=rows * 30,
            targets=rows,
            bytes=1,
            digest="d",
            outcomes={"kept": rows - 3, "truncated": 3, "dropped:empty_text": 2},
            tokens_lost=41,
            labels=dict.fromkeys(labels, rows // 3),
        )
        return ShardManifest(
            key=f"key-{split}", key_parts={}, split=split, task="classify", sources=(), shards=(shard,)
        )

    return Shards(train=manifest("train", 6000), eval=manifest("eval", 300))


def finished_run(folder, classes=3, steps=100):
    run = Folder(str(folder)) / "runs" / "topics-0badcafe"
    random = np.random.default_rng(1)
    labels = random.integers(0, classes, 300)
    guesses = np.where(random.random(300) < 0.8, labels, random.integers(0, classes, 300))
    evaluations = []
    for step in range(20, steps + 1, 20):
        value = 0.5 + step / 300 - (0.1 if step == steps else 0)
        metrics = {"accuracy": value, "f1_macro": value - 0.05, "loss": 1 - value / 2}
        evaluations.append(Evaluation(step=step, status="done", metrics=metrics, eval_key="e", rows=300, seconds=2.5))
    evaluations.append(Evaluation(step=steps + 1, status="failed", error=f"out of memory {EVIL}", eval_key="e"))
    best = evaluations[3]
    write_row_scores(run, best.step, np.arange(300), {"label": labels, "prediction": guesses})
    result = RunResult(
        status="done",
        best={"step": best.step, "metric": "accuracy", "value": best.metrics["accuracy"], "metrics": best.metrics},
        registry=RegisteredVersion(
            model="topics", version=4, alias="champion", step=best.step, source="/x", decision="promoted: it is better"
        ),
        evaluations=tuple(evaluations),
        steps=steps,
        tokens=1_234_567,
        restarts=1,
        goodput=0.93,
        seconds={"shards": 3.2, "training": 81.0, "evaluation": 20.5, "registration": 4.0},
    )
    return run, result, labels, guesses


LINEAGE = {"job": "not shown twice", "seed": "0", "version.torch": "2.13.0", "data.train.ledger": EVIL}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run, result, *_ = finished_run(tmp_path_factory.mktemp("report"))
    return render_report(run, result, job_of(), events_of(), shards_of(), LINEAGE)


class Reader(HTMLParser):
    """Tags with their attributes, and the text of each table row."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "tr" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_first_training_sequence_is_shown_with_its_targets(tmp_path, tiny_chat_tokenizer):
    talk = [{"role": "user", "content": "<b>good?"}, {"role": "assistant", "content": "the <i>film"}]
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "sft", [{"messages": talk}] * 5)
    run = run_of(job, ModelFolder(str(model), ""), shard_locally(job))
    _, result, *_ = finished_run(tmp_path)
    details = gather(run, result.model_copy(update={"best": None}))
    page = render_report(run.folder, result, job, events_of(), run.shards, details=details)
    assert "<mark>the &lt;i&gt;film&lt;|im_end|&gt;</mark>" in page and "<b>good" not in page


def test_the_page_stands_alone(page):
    reader = Reader(page)
    assert not [tag for tag, _ in reader.tags if tag in ("script", "link", "img", "iframe", "object", "base")]
    targets = [
        value for _, attrs in reader.tags for name, value in attrs.items() if name in ("href", "src", "xlink:href")
    ]
    assert all(target.startswith("#") for target in targets)
    assert not re.findall(r"url\((?!#)|@import", page)
    assert len(page) < 1_000_000


def test_no_text_from_outside_becomes_markup_and_no_secret_is_shown(page):
    assert EVIL not in page
    assert page.count("&lt;script&gt;") >= 3  # the error, the class, the lineage
    assert "verysecret" not in page


def test_the_headline_tells_best_version_and_state(page):
    for text in ("0.7667", "best, at step 80", "topics v4", "champion", "1,234,567 tokens", "1 min 49 s", "93%"):
        assert text in page


def test_there_is_a_curve_for_each_series_with_the_best_marked(page):
    plots = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert [re.split(" by step", plot)[0] for plot in plots] == [
        "accuracy",
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    ]
    assert "0.7667 at the best step 80" in plots[0] and "training from" in plots[1]
    assert page.count("best, step 80") == 2
    assert page.count("<style") == 1  # the page's own: one within a plot holds for all of it
    assert "#010203" not in page and "#0a0b01" not in page  # every stand-in colour became the page's
    ids = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) == 5


def test_evaluations_are_listed_with_the_best_marked_and_failures_explained(page):
    rows = {row[0]: row for row in Reader(page).rows if row and row[0]}
    assert rows["step"][1:4] == ["accuracy", "f1_macro", "loss"]
    assert rows["80"][1:4] == ["0.7667", "0.7167", "0.6167"] and rows["80"][-1] == "best"
    assert rows["100"][-1] == ""
    assert "out of memory" in rows["101"][-1]


def test_class_figures_equal_scikit_learn(tmp_path):
    from sklearn.metrics import classification_report, confusion_matrix

    run, result, labels, guesses = finished_run(tmp_path)
    rows = Reader(render_report(run, result, job_of(), [], shards_of())).rows
    known = classification_report(labels, guesses, output_dict=True)["2"]  # after <script> and ai
    coding = [row for row in rows if row and row[0] == "coding"]
    assert coding[0][1:4] == [f"{known[name]:.4f}" for name in ("precision", "recall", "f1-score")]
    counts = confusion_matrix(labels, guesses)[2].tolist()
    assert [int(cell or 0) for cell in coding[1][1:]] == counts


def test_every_value_has_its_interval_below_it_and_every_class_too(tmp_path):
    run, result, *_ = finished_run(tmp_path)
    below = {"accuracy": (0.6, 0.751), "loss": (-0.5, 120.0), "recall/coding": (0.25, 0.9)}
    evaluations = tuple(one.model_copy(update={"intervals": below if one.step < 60 else {}})
                        for one in result.evaluations)  # fmt: skip
    best = evaluations[3].model_copy(update={"intervals": below})
    result = result.model_copy(
        update={"evaluations": (*evaluations[:3], best), "baselines": {"nothing": {"loss": 9.0}}}
    )
    rows = Reader(render_report(run, result, job_of(), [], shards_of())).rows
    of = {row[0]: row for row in rows if row}
    assert of["20"][1] == f"{20 / 300 + 0.5:.4f}\n0.600–0.751" and of["20"][3].endswith("\n-0.500 to 120")
    assert of["60"][1] == "0.7000" and of["nothing"][3] == "9.0000"
    recall = next(row for row in rows if row and row[0] == "coding")[2]
    assert recall.endswith("\n0.250–0.900")


def test_entity_types_have_figures_too_and_those_of_other_sets_do_not_stand_among_them(tmp_path):
    metrics = {"f1": 0.5, "f1/PER": 0.25, "recall/PER": 0.75, "f1/LOC": 1.0, "f1/PER@old": 0.1}
    table = table_by_class(Evaluation(step=5, status="done", metrics=metrics, eval_key="e"), ["old"])
    assert table.columns == ("class", "f1", "recall")
    assert table.texts() == [["LOC", "1.0000", "–"], ["PER", "0.2500", "0.7500"]]
    assert table_by_class(Evaluation(step=5, status="done", metrics={"f1": 0.5}, eval_key="e")) is None


def test_planned_memory_stands_beside_what_each_rank_measured():
    way = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "logits", "working", "margin"), 1.0)
    way |= {
        "way": "zero3",
        "moment": "backward pass",
        "device_gib": 7.0,
        "staging": 2.0,
        "host_gib": 0.0,
        "disk_gib": 3.0,
    }
    plan = {
        "deepspeed": "zero3",
        "activation_checkpointing": "full",
        "on_cpu": False,
        "ways": [{**way, "way": "zero1"}, way],
    }
    done = [{"kind": "done", "step": 3, "device_gib": [6.5, 6.25], "host_gib": [1.5, 1.75]}]
    table = memory_table(plan, parse_events(json.dumps(event).encode() for event in done))
    rows = {row[0]: row[1:] for row in table.texts()}
    assert table.title.endswith("at the backward pass, and measured; deepspeed zero3, activation_checkpointing full")
    assert rows["GPU: all of these"] == ["7.0000", "–"]
    assert rows["GPU: tensors at their peak"] == ["–", "rank 0 6.50, rank 1 6.25"]
    assert rows["host: resident at the peak, with all libraries"][1] == "rank 0 1.50, rank 1 1.75"
    assert rows["disk: state that is kept there"] == ["3.0000", "–"] and "host: state that is kept there" not in rows
    on_cpu = {
        "deepspeed": "zero3",
        "on_cpu": False,
        "ways": [],
        "state_gib_per_worker": 0.5,
        "host_gib_per_worker": 0.25,
    }
    died = memory_table(on_cpu, parse_events([b'{"kind": "step", "step": 1, "loss": 1, "memory_gib": 0.75}']))
    assert [row[1:] for row in died.texts()] == [["0.5000", "–"], ["0.2500", "–"], ["–", "0.75"]]
    assert by_rank([1.0] * 9 + [2.0]) == "1.00 to 2.00 over 10 ranks, most on rank 9" and memory_table({}, []) is None


def test_a_plot_with_many_series_keeps_its_height():
    def heights(names):
        metrics = dict.fromkeys(names, 0.5)
        done = [Evaluation(step=step, status="done", metrics=metrics, eval_key="e") for step in (1, 2)]
        svg = draw_curves([], done, 2, "f1", Details())[0]
        of_axes = re.search(
            r'<g id="patch_2">\s*<path d="M [\d.]+ ([\d.]+) \s*L [\d.]+ [\d.]+ \s*L [\d.]+ ([\d.]+)', svg
        )
        return float(of_axes[1]) - float(of_axes[2])

    few, many = heights(["f1"]), heights(["f1", *map(str, range(13))])
    assert many > 0.85 * few


def test_one_evaluation_stands_at_a_whole_step_and_what_a_guess_has_not_is_a_dash():
    one = Evaluation(step=2, status="done", metrics={"f1": 81.0, "loss": 2.5}, eval_key="e")
    (plot, _) = draw_curves((), [one], 2, "f1", Details())
    assert "1.975" not in plot and "2.025" not in plot and ">2</text>" in plot
    table = evaluation_table([one], "f1", 2, None, {"no answer": {"f1": 0.0, "loss": float("nan")}})
    assert table.texts()[-1][:3] == ["no answer", "0.0000", "–"]


def test_many_classes_are_shown_as_the_worst_confusions(tmp_path):
    run, result, *_ = finished_run(tmp_path, classes=40)
    page = render_report(run, result, job_of(), [])
    assert "most frequent confusions" in page and 'class="matrix"' not in page


def test_every_input_row_is_in_the_ledger(page):
    rows = [row for row in Reader(page).rows if row]
    assert ["", "train", "eval"] in rows
    told = {row[0]: row[1] for row in rows}
    assert told["kept"] == "5,997 (99.92%)" and told["dropped:empty_text"] == "2 (0.03%)"
    assert (told["rows in"], told["tokens"], told["tokens lost"]) == ("6,002", "180,000", "41")


def test_what_the_rows_tell_is_shown(tmp_path):
    view = RowView(
        file="/d/dev.jsonl", row=70, place="dev.jsonl:3", text=EVIL, label="ai", prediction="coding", loss=3.25
    )
    details = Details({"the majority class": 0.4}, (view,), (view,))
    run, result, *_ = finished_run(tmp_path)
    result = result.model_copy(update={"intervals": {"accuracy": (0.71, 0.81)}})
    page = render_report(run, result, job_of(), events_of(), shards_of(), LINEAGE, details)
    assert EVIL not in page and page.count("dev.jsonl:3") == 2 and page.count('data-name="label"') == 2
    assert "95 %: 0.710–0.810" in page and "the majority class 0.4" in page
    assert "Where it is most wrong, at step 80" in page and "Generated texts, at step 80" in page
    assert "model = AutoModelForSequenceClassification.from_pretrained(&#39;/x&#39;)" in page
    digests = page[page.index("<summary>Digests and versions") :]
    assert "version.torch" in digests and "version.torch" not in page[: page.index("<summary>Digests")]
    assert "seed" not in digests.partition("</details>")[0]


def test_a_step_that_was_run_again_is_drawn_once_as_it_ran_last(tmp_path):
    steps = steps_of(events_of())
    assert [event.step for event in steps] == list(range(1, 101))
    assert steps[54].time > steps[59].time - 10


def test_a_run_that_failed_at_once_has_a_report_with_its_error(tmp_path):
    run, result = Folder(str(tmp_path)) / "r", RunResult(status="failed", error=f"no space left {EVIL}")
    page = render_report(run, result, job_of(), [])
    assert "no space left &lt;script&gt;" in page
    assert "<svg" not in page


def test_how_a_score_was_computed_stands_beside_it(tmp_path):
    signature = {"bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"}
    evaluation = Evaluation(step=4, status="done", metrics={"bleu": 20.5}, notes=signature, eval_key="e")
    result = RunResult(status="done", evaluations=(evaluation,))
    assert f"bleu: {signature['bleu']}" in render_report(Folder(str(tmp_path)), result, job_of(task="seq2seq"), [])


def test_odd_numbers_are_drawn_around(tmp_path):
    nan = float("nan")
    events = [StepEvent(time=0.0, step=step, loss=nan if step % 2 else 1.0) for step in range(1, 9)]
    evaluation = Evaluation(step=4, status="done", metrics={"loss": nan, "perplexity": float("inf")}, eval_key="e")
    result = RunResult(status="preempted", evaluations=(evaluation,))
    page = render_report(Folder(str(tmp_path)), result, job_of(task="pretrain"), events)
    assert page.count("<svg") == 1
    assert "inf" in page


def test_a_long_run_gives_a_page_of_bearable_size(tmp_path):
    run, result, *_ = finished_run(tmp_path, steps=20_000)
    assert len(render_report(run, result, job_of(), events_of(20_000))) < 3_000_000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7200, "2 h"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_the_index_lists_every_run_that_ended_with_a_link_to_its_report(tmp_path):
    run, result, *_ = finished_run(tmp_path)
    run.write_bytes("job.yaml", yaml.safe_dump(job_of().model_dump(mode="json")).encode())
    run.write_bytes("result.json", result.model_dump_json().encode())
    (run.parent / "other-11111111").write_bytes("job.yaml", b"torn: [")
    for _ in range(2):  # the page itself is no run
        write_index(run.parent)
    assert [one.run for one in run_status(Folder(str(tmp_path)))] == ["other-11111111", "topics-0badcafe"]
    page = (run.parent.path / "index.html").read_text()
    assert 'href="topics-0badcafe/report.html"' in page and "other-" not in page
    (row,) = [row for row in Reader(page).rows if row and row[0] == "topics-0badcafe"]
    assert row[1:7] == ["done", "0.7667", "accuracy", "80", "100", "topics v4 champion"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", row[7]) and row[8:] == ["classify", "some/model"]
    assert "no run" not in page and "verysecret" not in page
