"""A table as data: what terminal and report page both show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.run.describe import interval


@dataclass(frozen=True)
class Table:
    """Rows of values under column names. `kinds` marks rows: best, failure, or empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kinds: Sequence[str] = ()

    def texts(self) -> list[list[str]]:
        """The cells as both terminal and page print them."""
        return [[text(value) for value in row] for row in self.rows]

    def kind(self, row: int) -> str:
        """The mark of a row."""
        return self.kinds[row] if self.kinds else ""


@dataclass(frozen=True)
class Measure:
    """A metric with the two values that it lies between, if they are known."""

    value: float | None
    between: tuple[float, float] | None = None


def text(value: Any) -> str:
    """A value for people: four decimals, or four digits where it is large or tiny; a dash for none; an interval on a
    line of its own."""
    if isinstance(value, Measure):
        return "\n".join([text(value.value), *([interval(*value.between)] if value.between else [])])
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
