"""Text recognition metrics: edit distances per character or word."""

from collections.abc import Callable

import torch
from torch import Tensor

from holofunc.metrics.base import Average, Metric, row_weights, zeros
from holofunc.ops import ctc

__all__ = ["char_error_rate", "word_error_rate"]

PRIME = 1_000_003
"""The base of the numbers that words become; of 64 bits, so that two words hardly ever become one."""


def char_error_rate(*, blank: int = 0, padding: int = ctc.PADDING) -> Metric:
    """The edit distance in characters between prediction and truth, divided by the number of true characters.

    `update` takes labels (N, T), or scores (T, N, K), frames first, of which the best path is decoded; and targets
    (N, L), labels, both padded at the end.

    Args:
        blank: the class that stands for no character.
        padding: what follows the last label of a text.

    Returns:
        A metric that computes a 0-d tensor, which may exceed 1.

    Source: the character error rate of torchmetrics, over all texts together.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.char_error_rate()
        >>> read, written = torch.tensor([[1, 2, 3], [4, -100, -100]]), torch.tensor([[1, 3, -100], [4, 4, 4]])
        >>> metric.compute(metric.update(metric.init(), read, written)).item()
        0.6
    """
    return _error_rate(lambda labels: labels, blank, padding)


def word_error_rate(space: int, *, blank: int = 0, padding: int = ctc.PADDING) -> Metric:
    """The edit distance in words between prediction and truth, divided by the number of true words.

    Args:
        space: the label between words; several in a row are one.
        blank: as in `char_error_rate`, like what follows.
        padding: what follows the last label of a text.

    Returns:
        A metric that computes a 0-d tensor, which may exceed 1.

    Source: the word error rate of torchmetrics, over all texts together.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.word_error_rate(space=9)
        >>> read, written = torch.tensor([[1, 2, 9, 3, 3]]), torch.tensor([[1, 2, 9, 3, -100]])
        >>> metric.compute(metric.update(metric.init(), read, written)).item()
        0.5
    """
    return _error_rate(lambda labels: _words(labels, space, padding), blank, padding)


def _error_rate(units: Callable[[Tensor], Tensor], blank: int, padding: int) -> Metric:
    def init(*, device: torch.device | str | None = None) -> Average:
        return Average(zeros((), device), zeros((), device))

    def update(state: Average, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Average:
        labels = outputs
        if outputs.is_floating_point():
            labels = ctc.greedy_decode(outputs, blank=blank).labels
            labels = torch.where(labels == ctc.PADDING, padding, labels)
        read, written = units(labels.long()), units(targets.long())
        edits = ctc.edit_distance(read, written, padding=padding)
        weight = row_weights(weights, edits).to(state.total.dtype)
        return Average(
            state.total + (edits * weight).sum(), state.weight + ((written != padding).sum(1) * weight).sum()
        )

    def merge(a: Average, b: Average) -> Average:
        return Average(a.total + b.total, a.weight + b.weight)

    return Metric(init, update, merge, lambda state: state.total / state.weight)


def _words(labels: Tensor, space: int, padding: int) -> Tensor:
    """A number for each word of each text, (N, L), padded at the end."""
    length = labels.shape[1]
    inside = (labels != space) & (labels != padding)
    words = labels.new_full((len(labels), length + 1), padding)  # what is no word's end goes into a column more
    word, count = torch.zeros_like(labels[:, 0]), torch.zeros_like(labels[:, 0])
    for t in range(length):
        word = torch.where(inside[:, t], word * PRIME + labels[:, t] + 1, word)
        ends = inside[:, t] & ~inside[:, t + 1] if t + 1 < length else inside[:, t]
        words = words.scatter(1, torch.where(ends, count, length)[:, None], word[:, None])
        word, count = torch.where(ends, 0, word), count + ends
    return words[:, :length]
