"""SQuAD's exact match and F1, by the rules of the official evaluation of version 1.1 and of version 2.0.

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822). The two differ where nothing is left of an answer
after normalization: version 1.1 gives such an answer no F1, version 2.0 compares it as an empty one. Pure.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, one blank between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(said: str, answer: str) -> float:
    """1 where the two are the same after normalization."""
    return float(normalize(said) == normalize(answer))


def f1(said: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, counted as often as they stand."""
    ours, theirs = normalize(said).split(), normalize(answer).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def f1_or_empty(said: str, answer: str) -> float:
    """As `f1`, but an empty side matches an empty one alone."""
    ours, theirs = normalize(said), normalize(answer)
    return float(ours == theirs) if not ours or not theirs else f1(said, answer)


def score_v1(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the best of several answers, as version 1.1 has them; 0 where there are none."""
    return _best(exact, said, answers), _best(f1, said, answers)


def score_v2(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """The same as version 2.0 has them; a question without answers is answered right by an empty text alone."""
    wanted = [answer for answer in answers if normalize(answer)] or [""]
    return _best(exact, said, wanted), _best(f1_or_empty, said, wanted)


def _best(measure: Callable[[str, str], float], said: str, answers: Sequence[str]) -> float:
    return max((measure(said, answer) for answer in answers), default=0.0)
