"""The confusion matrix as a picture."""

import numpy as np

from trainers.evaluation.confusion import _figure

SHOWN = 300
"""Pixels of a card of TensorBoard."""


def test_names_and_counts_can_be_read_where_the_picture_is_shown_small() -> None:
    for count in (7, 12_345):
        figure = _figure(np.eye(9, dtype=int) * count, [f"topic {number}" for number in range(9)])
        (axes,) = figure.axes
        texts = [text for text in (*axes.get_xticklabels(), *axes.texts) if text.get_text()]
        width = figure.get_size_inches()[0]
        assert len(texts) == 18  # a zero is left out
        assert count > 9 or min(text.get_fontsize() / 72 / width * SHOWN for text in texts) > 7
        figure.canvas.draw()
        cell = axes.get_window_extent().width / 9
        assert max(text.get_window_extent().width for text in axes.texts) <= cell
