"""SQuAD files as published: articles with paragraphs with questions, flattened to one row a question.

{"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers": [...]}]}]}]},
versions 1.1 and 2.0 (whose unanswerable questions have no answers). Other documents pass through.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Example = dict[str, Any]


def questions(elements: Iterable[Example | None]) -> Iterator[Example | None]:
    """Rows of a document: each question of an article, any other element as it is. What has no form is malformed."""
    for element in elements:
        if element is not None and isinstance(element.get("paragraphs"), list):
            yield from _of_article(element)
        else:
            yield element


def _of_article(article: Mapping[str, Any]) -> Iterator[Example | None]:
    for paragraph in article["paragraphs"]:
        if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get("qas"), list):
            yield None
            continue
        for asked in paragraph["qas"]:
            yield _row(article, paragraph, asked) if isinstance(asked, Mapping) else None


def _row(article: Mapping[str, Any], paragraph: Mapping[str, Any], asked: Mapping[str, Any]) -> Example:
    """A question with its context; one marked impossible has no answers, whatever stands there."""
    answers = [] if asked.get("is_impossible") else asked.get("answers")
    row = {"title": article.get("title"), "context": paragraph.get("context"), **asked, "answers": answers}
    return {name: value for name, value in row.items() if value is not None}
