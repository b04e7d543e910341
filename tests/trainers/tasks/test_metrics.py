"""Every metric equals its reference library's to 1e-9, on random predictions, however the rows are grouped."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainers.tasks import TaskOptions, load_task
from trainers.tasks.metrics.classes import multi_label_metrics, single_label_metrics
from trainers.tasks.metrics.entities import entity_counts, entity_metrics, entity_types
from trainers.tasks.metrics.generated_text import (
    overlap_metrics,
    overlap_scores,
    signatures,
    translation_counts,
    translation_metrics,
)
from trainers.tasks.metrics.spans import merge_windows, span_metrics
from trainers.tasks.metrics.squad import score_v1, score_v2

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=25, deadline=None)


def close(value: float) -> Any:
    return pytest.approx(value, abs=1e-9, rel=0)


def shuffle(row_scores: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same rows in another order, as several processes would give them."""
    order = np.random.default_rng(seed).permutation(len(next(iter(row_scores.values()))))
    return {name: values[order] for name, values in row_scores.items()}


@quick
@given(SEEDS, st.integers(2, 6))
def test_classification_equals_scikit_learn(seed: int, classes: int) -> None:
    from sklearn import metrics

    draw = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), draw.integers(0, classes, 95)])
    scores = draw.dirichlet(np.ones(classes), len(label))
    prediction, losses = scores.argmax(1), draw.random(len(label))
    row_scores = {"label": label, "prediction": prediction, "loss_sum": losses}
    row_scores |= {f"score_{index}": scores[:, index] for index in range(classes)}
    names = [f"c{index}" for index in range(classes)]
    found = single_label_metrics(shuffle(row_scores, seed), names)
    report = metrics.classification_report(label, prediction, target_names=names, output_dict=True, zero_division=0)
    assert found["accuracy"] == close(metrics.accuracy_score(label, prediction))
    for kind in ("macro", "micro", "weighted"):
        assert found[f"f1_{kind}"] == close(metrics.f1_score(label, prediction, average=kind))
    assert found["mcc"] == close(metrics.matthews_corrcoef(label, prediction))
    asked = scores[:, 1] if classes == 2 else scores
    assert found["auroc"] == close(metrics.roc_auc_score(label, asked, multi_class="ovr"))
    for name in names:
        assert found[f"precision/{name}"] == close(report[name]["precision"])
        assert found[f"recall/{name}"] == close(report[name]["recall"])
        assert found[f"f1/{name}"] == close(report[name]["f1-score"])
    assert found["loss"] == close(losses.mean())


@pytest.mark.parametrize("several", [False, True])
def test_one_metric_alone_is_what_all_of_them_say(several: bool) -> None:
    draw, task = np.random.default_rng(3), load_task("classify", TaskOptions(multi_label=several))
    row_scores: dict[str, Any] = {"loss_sum": draw.random(60)}
    if several:
        row_scores |= {f"true_{index}": draw.integers(0, 2, 60, dtype=np.int8) for index in range(3)}
    else:
        row_scores |= {"label": draw.integers(0, 3, 60), "prediction": draw.integers(0, 3, 60)}
    scores = draw.dirichlet(np.ones(3), 60)
    row_scores |= {f"score_{index}": scores[:, index] for index in range(3)}
    every = task.metrics(row_scores)
    assert set(every) >= {"accuracy", "f1_macro", "auroc"}
    assert {name: task.metric_value(name, row_scores) for name in every} == every


def test_auroc_is_left_out_where_a_class_is_missing() -> None:
    row_scores = {"label": np.zeros(5, int), "prediction": np.zeros(5, int), "loss_sum": np.ones(5)}
    row_scores |= {"score_0": np.full(5, 0.9), "score_1": np.full(5, 0.1)}
    assert "auroc" not in single_label_metrics(row_scores, ["a", "b"])


@quick
@given(SEEDS, st.integers(2, 5))
def test_multi_label_equal_scikit_learn(seed: int, classes: int) -> None:
    from sklearn import metrics

    draw = np.random.default_rng(seed)
    truth = np.concatenate([np.eye(classes, dtype=np.int8), draw.integers(0, 2, (60, classes)).astype(np.int8)])
    scores = draw.random(truth.shape)
    row_scores: dict[str, Any] = {"loss_sum": draw.random(len(truth))}
    row_scores |= {f"true_{index}": truth[:, index] for index in range(classes)}
    row_scores |= {f"score_{index}": scores[:, index] for index in range(classes)}
    found = multi_label_metrics(shuffle(row_scores, seed), [f"c{index}" for index in range(classes)])
    given_labels = (scores >= 0.5).astype(int)
    assert found["accuracy"] == close(metrics.accuracy_score(truth, given_labels))
    for kind in ("macro", "micro", "weighted"):
        assert found[f"f1_{kind}"] == close(metrics.f1_score(truth, given_labels, average=kind, zero_division=0))
    assert found["auroc"] == close(metrics.roc_auc_score(truth, scores, average="macro"))


SCHEMES = {
    "BIO": ["O", "B-per", "I-per", "B-loc", "I-loc", "B-x", "I-x"],
    "BIOES": ["O"] + [f"{part}-{kind}" for kind in ("per", "loc") for part in "BIES"],
}


@quick
@given(SEEDS, st.sampled_from(list(SCHEMES)))
def test_entities_equal_seqeval_plain_and_strict_overall_and_by_type(seed: int, scheme: str) -> None:
    from seqeval import metrics
    from seqeval.scheme import IOB2, IOBES

    draw, labels = random.Random(seed), SCHEMES[scheme]
    truth = [[draw.choice(labels) for _ in range(draw.randint(1, 9))] for _ in range(50)]
    said = [[tag if draw.random() < 0.6 else draw.choice(labels) for tag in tags] for tags in truth]
    found = entity_metrics(shuffle(entity_counts(truth, said, labels), seed), entity_types(labels))
    strict = {"mode": "strict", "scheme": IOB2 if scheme == "BIO" else IOBES}
    for prefix, options in (("", {}), ("strict_", strict)):
        report = metrics.classification_report(truth, said, output_dict=True, zero_division=0, **options)
        assert found[f"{prefix}f1"] == close(metrics.f1_score(truth, said, zero_division=0, **options))
        assert found[f"{prefix}precision"] == close(metrics.precision_score(truth, said, zero_division=0, **options))
        assert found[f"{prefix}recall"] == close(metrics.recall_score(truth, said, zero_division=0, **options))
        for kind in entity_types(labels):
            if kind in report:
                assert found[f"{prefix}f1/{kind}"] == close(report[kind]["f1-score"])
                assert found[f"{prefix}precision/{kind}"] == close(report[kind]["precision"])
                assert found[f"{prefix}recall/{kind}"] == close(report[kind]["recall"])


VOCABULARY = ["the", "a", "cat", "Katze", "läuft", "runs", "running", ".", ",", "don't", "42", "日本", "\n", "!", "x-y"]


def sentences(seed: int, count: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    wanted = [" ".join(draw.choice(VOCABULARY) for _ in range(draw.randint(1, 15))) for _ in range(count)]
    said = [" ".join(word for word in text.split(" ") if draw.random() < 0.8) for text in wanted]
    said = [text if draw.random() < 0.9 else draw.choice(wanted) for text in said]
    return said, wanted


@quick
@given(SEEDS, st.sampled_from(["13a", "intl", "char"]))
def test_bleu_and_chrf_equal_sacrebleu(seed: int, tokenize: str) -> None:
    import sacrebleu

    said, wanted = sentences(seed, 30)
    found = translation_metrics(shuffle(translation_counts(said, wanted, tokenize), seed), tokenize)
    assert found["bleu"] == close(sacrebleu.corpus_bleu(said, [wanted], tokenize=tokenize).score)
    assert found["chrf"] == close(sacrebleu.corpus_chrf(said, [wanted]).score)


def test_the_signature_is_sacrebleus() -> None:
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="zh")
    metric.corpus_score(["x"], [["x"]])
    assert signatures("zh")["bleu"] == str(metric.get_signature())


@quick
@given(SEEDS)
def test_rouge_equals_rouge_score(seed: int) -> None:
    from rouge_score import rouge_scorer, scoring

    said, wanted = sentences(seed, 20)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(said, wanted, strict=True)]
    found = overlap_metrics(shuffle(overlap_scores(said, wanted), seed))
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert found[name] == close(float(np.mean([one[name].fmeasure for one in scores])))
    assert found["exact_match"] == close(np.mean([a.strip() == b.strip() for a, b in zip(said, wanted, strict=True)]))
    assert scoring.BootstrapAggregator  # the scorer above is the package's own


@quick
@given(SEEDS, st.sampled_from(["regression", "cosine"]))
def test_correlations_equal_scipy(seed: int, objective: str) -> None:
    from scipy import stats

    draw = np.random.default_rng(seed)
    score = draw.integers(0, 6, 101) / 1.0  # ties
    said = score + draw.normal(size=101)
    task = load_task("similarity", TaskOptions(objective=objective))
    found = task.metrics(shuffle({"score": score, "said": said, "loss_sum": (score - said) ** 2}, seed))
    assert found["pearson"] == close(stats.pearsonr(score, said).statistic)
    assert found["spearman"] == close(stats.spearmanr(score, said).statistic)
    assert found["loss"] == close(((score - said) ** 2).mean())


# The official evaluation's logic, as its two versions describe it, over whole data sets: the reference for ours.


def official_normalize(text: str) -> str:
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(prediction: str, truth: str, version: int) -> float:
    said, wanted = official_normalize(prediction).split(), official_normalize(truth).split()
    if version == 2 and (not said or not wanted):
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    return 2 * (same / len(said)) * (same / len(wanted)) / (same / len(said) + same / len(wanted))


def official_scores(dataset: list[dict[str, Any]], predictions: dict[str, str], version: int) -> dict[str, list[float]]:
    exact, f1 = [], []
    for asked in dataset:
        answers = [a for a in asked["answers"] if version == 1 or official_normalize(a)]
        answers = answers or ([""] if version == 2 else [])
        said = predictions[asked["id"]]
        exact.append(max(float(official_normalize(said) == official_normalize(answer)) for answer in answers))
        f1.append(max(official_f1(said, answer, version) for answer in answers))
    return {"exact": exact, "f1": f1}


def official_best(
    predictions: dict[str, str], na: dict[str, float], scores: dict[str, float], has: dict[str, bool]
) -> Any:
    current = best = sum(1 for asked in has if not has[asked])
    threshold = 0.0
    for asked in sorted(na, key=lambda key: na[key]):
        current += scores[asked] if has[asked] else -1 if predictions[asked] else 0
        if current > best:
            best, threshold = current, na[asked]
    return 100.0 * best / len(scores), threshold


TEXTS = st.lists(st.sampled_from(["the", "A", "cat", "Cat!", "sat", "an", "...", "éa", "42"]), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_answers_score_as_the_official_squad_evaluation_has_it(said: list[str], answers: list[list[str]]) -> None:
    text, wanted = " ".join(said), [" ".join(answer) for answer in answers]
    asked = [{"id": "q", "answers": wanted}]
    for version, score in ((1, score_v1), (2, score_v2)):
        official = official_scores(asked, {"q": text}, version)
        assert score(text, wanted) == (close(official["exact"][0]), close(official["f1"][0]))


@quick
@given(SEEDS, st.booleans())
@example(48837, True)  # two thresholds whose sums differ in the last digit alone
def test_span_metrics_equal_the_official_script_over_windows(seed: int, unanswerable: bool) -> None:
    draw = random.Random(seed)
    words = ["cat", "dog", "ran", "home", "far", "away"]
    asked, windows, predictions, margins = [], [], {}, {}
    for number in range(60):
        answers = [" ".join(draw.sample(words, 2)) for _ in range(draw.randint(1, 2))]
        if unanswerable and draw.random() < 0.4:
            answers = []
        best: tuple[float, str] | None = None
        nulls = []
        for window in range(draw.randint(1, 3)):
            said, score, null = " ".join(draw.sample(words, draw.randint(1, 2))), draw.random(), draw.random()
            (exact1, f11), (exact2, f12), (empty, _) = (
                score_v1(said, answers),
                score_v2(said, answers),
                score_v2("", answers),
            )
            scores = {"exact_v1": exact1, "f1_v1": f11, "exact_v2": exact2, "f1_v2": f12, "empty": empty}
            place = {"window": window, "score": score, "null_score": null, "answers": len(answers), "loss_sum": 1.0}
            windows.append({**scores, **place})
            nulls.append(null)
            if best is None or score > best[0]:
                best = (score, said)
        assert best is not None
        asked.append({"id": str(number), "answers": answers})
        predictions[str(number)], margins[str(number)] = best[1], min(nulls) - best[0]
    row_scores = {name: np.array([one[name] for one in windows]) for name in windows[0]}
    rows, merged = merge_windows(np.arange(len(windows)), row_scores)
    assert len(rows) == 60
    found = span_metrics(shuffle(merged, seed), 0.1)
    version = 2 if any(not one["answers"] for one in asked) else 1
    said_all = {key: "" if version == 2 and margins[key] > 0.1 else text for key, text in predictions.items()}
    official = official_scores(asked, said_all, version)
    for name in ("exact", "f1"):
        assert found[name] == close(100.0 * sum(official[name]) / 60)
        if version == 2:
            raw = dict(zip(predictions, official_scores(asked, predictions, 2)[name], strict=True))
            has = {one["id"]: bool(one["answers"]) for one in asked}
            best_score, threshold = official_best(predictions, margins, raw, has)
            assert found[f"best_{name}"] == close(best_score)
            assert found[f"best_{name}_threshold"] == close(threshold)


def test_metrics_are_json_numbers_alone() -> None:
    row_scores = {"label": np.array([0, 1]), "prediction": np.array([0, 1]), "loss_sum": np.array([0.1, 0.2])}
    json.dumps(single_label_metrics(row_scores, ["a", "b"]), allow_nan=False)
