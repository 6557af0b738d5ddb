"""CTC decoding: from scores of frames to labels.

Everything has static shapes: a text is a row of labels, padded at its end with `PADDING`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import tree
from holofunc.ops.arithmetic import upcast
from holofunc.ops.checks import check_counts

__all__ = ["PADDING", "Decoded", "check_lengths", "edit_distance", "greedy_decode", "prefix_beam_decode"]

PADDING = -100
"""What follows a text's last label; the ``ignore_index`` of `holofunc.losses.ctc`."""

IMPOSSIBLE = -1e30  # unlike -inf, it can be added and compared without becoming nan


class Decoded(NamedTuple):
    """Texts as labels.

    Attributes:
        labels: (N, T), padded at the end.
        lengths: number of labels, (N,).
        scores: log-probabilities, (N,).
    """

    labels: Tensor
    lengths: Tensor
    scores: Tensor


def greedy_decode(log_probs: Tensor, lengths: Tensor | None = None, *, blank: int = 0) -> Decoded:
    """The labels of the most probable class of each frame, repeats merged and blanks dropped.

    Args:
        log_probs: (T, N, K), frames first; logits do as well.
        lengths: number of valid frames, (N,), in [0, T]; T where None.
        blank: the class that stands for no label.

    Returns:
        Labels, their numbers, and the sum of the frames' maxima: the log-probability of that one path, not of the text.

    Raises:
        ValueError: shapes that do not fit, or a blank out of range.

    Example:
        >>> import torch
        >>> from holofunc.ops import ctc
        >>> path = torch.tensor([[1, 1, 0, 1, 2, 2]]).T  # "a", once more after a blank, "b"
        >>> ctc.greedy_decode(torch.nn.functional.one_hot(path, 3).float().log()).labels
        tensor([[   1,    1,    2, -100, -100, -100]])
    """
    _check(log_probs, lengths, blank)
    best, path = log_probs.max(-1)
    best, path = upcast(best).T, path.T
    valid = _valid(path, lengths)
    kept = valid & (path != blank) & (path != F.pad(path[:, :-1], (1, 0), value=blank))
    place = torch.where(kept, kept.cumsum(1) - 1, path.shape[1])  # what is dropped goes into a column more
    labels = path.new_full((len(path), path.shape[1] + 1), PADDING).scatter(1, place, path)[:, :-1]
    return Decoded(labels, kept.sum(1), torch.where(valid, best, 0).sum(1))


def prefix_beam_decode(
    log_probs: Tensor,
    lengths: Tensor | None = None,
    *,
    beam_width: int = 5,
    token_topk: int | None = None,
    blank: int = 0,
) -> Decoded:
    """The most probable text found by a beam search over prefixes, each with the sum of the paths that spell it.

    A prefix ends in a blank or in its last label; p_b and p_l are the probabilities of the two. With a frame's p,
    p_b' = (p_b + p_l) p(blank) and p_l' = p_l p(last) for the same prefix, and (p_b + p_l) p(c), for c = last p_b p(c),
    for the prefix with c appended, where the same prefix may be among the beams and takes it over.

    Args:
        log_probs: (T, N, K), frames first, normalized.
        lengths: number of valid frames, (N,), in [0, T]; T where None.
        beam_width: prefixes that are kept from frame to frame. With as many as there are texts, the search is exact.
        token_topk: labels of a frame that are followed, the most probable ones; None is all.
        blank: the class that stands for no label.

    Returns:
        Labels, their numbers, and the log-probability of the text as far as its paths were followed.

    Raises:
        ValueError: shapes that do not fit, or a blank, a ``beam_width`` or ``token_topk`` out of range.

    Source: Hannun et al., "First-pass large vocabulary continuous speech recognition" (arXiv 1408.2873), algorithm 1,
        without a language model.

    Example:
        >>> import torch
        >>> from holofunc.ops import ctc
        >>> log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()[:, None]  # two blanks 0.36, any "a" 0.64
        >>> ctc.greedy_decode(log_probs).lengths, ctc.prefix_beam_decode(log_probs).lengths
        (tensor([0]), tensor([1]))
    """
    _check(log_probs, lengths, blank)
    frames, num, classes = log_probs.shape
    check_counts(beam_width=beam_width)
    log_probs = upcast(log_probs)
    if token_topk is not None:
        check_counts(token_topk=token_topk)
        if token_topk >= classes:
            raise ValueError(f"token_topk must be at most {classes - 1}, the number of labels, got {token_topk}")
        is_blank = torch.arange(classes, device=log_probs.device) == blank
        least = torch.where(is_blank, IMPOSSIBLE, log_probs).topk(token_topk).values[..., -1:]
        log_probs = torch.where(is_blank | (log_probs >= least), log_probs, IMPOSSIBLE)
    log_probs = log_probs.clamp_min(IMPOSSIBLE)
    valid = _valid(log_probs[..., 0].T, lengths)
    beams = _Beams.start(log_probs, beam_width)
    for t in range(frames):
        moved = beams.moved(log_probs[t], blank)
        at = valid[:, t]
        beams = _Beams(
            *(torch.where(at.view(num, *[1] * (x.ndim - 1)), x, y) for x, y in zip(moved, beams, strict=True))
        )
    best = beams.total().argmax(1, keepdim=True)
    count = beams.counts.gather(1, best).squeeze(1)
    labels = beams.labels.gather(1, best[..., None].expand(-1, -1, frames)).squeeze(1)
    return Decoded(labels, count, beams.total().gather(1, best).squeeze(1))


class _Beams(NamedTuple):
    """Prefixes of N texts, W of each, and the log-probabilities that one ends in a blank, or in its last label."""

    labels: Tensor  # (N, W, T)
    counts: Tensor  # (N, W)
    in_blank: Tensor  # (N, W)
    in_label: Tensor  # (N, W)

    @classmethod
    def start(cls, log_probs: Tensor, width: int) -> "_Beams":
        """The empty prefix, and places for others."""
        frames, num, _ = log_probs.shape
        labels = torch.full((num, width, frames), PADDING, device=log_probs.device)
        nothing = log_probs.new_full((num, width), IMPOSSIBLE)
        counts = torch.zeros_like(labels[..., 0])
        return cls(labels, counts, torch.where(torch.arange(width, device=log_probs.device) == 0, 0, nothing), nothing)

    def total(self) -> Tensor:
        return torch.logaddexp(self.in_blank, self.in_label)

    def moved(self, frame: Tensor, blank: int) -> "_Beams":
        """The best after one more frame, with log-probabilities (N, K)."""
        width, classes = self.counts.shape[1], frame.shape[1]
        total = self.total()
        last = self.labels.gather(2, (self.counts - 1).clamp_min(0)[..., None]).squeeze(2)
        written = self.counts > 0
        at_last = torch.where(written, last, 0)
        label = torch.arange(classes, device=frame.device)
        repeats = written[..., None] & (label == at_last[..., None])
        longer = torch.where(repeats, self.in_blank[..., None], total[..., None]) + frame[:, None]
        longer = torch.where(label == blank, IMPOSSIBLE, longer)  # (N, W, K), a label appended
        in_blank = total + frame[:, blank, None]
        in_label = torch.where(written, self.in_label + frame.gather(1, at_last), IMPOSSIBLE)
        # Beam i with the last label of beam j appended may be beam j: its paths are counted there.
        child = self._child()
        of_parent = torch.where(child, longer.gather(2, at_last[:, None].expand(-1, width, -1)), IMPOSSIBLE)
        in_label = torch.logaddexp(in_label, of_parent.amax(1))  # of the parents, there is at most one
        taken = (child[..., None] & repeats[:, None]).any(2)  # over the children j
        longer = torch.where(taken, IMPOSSIBLE, longer)
        return self._best(in_blank, in_label, longer)

    def _child(self) -> Tensor:
        """(N, W, W): whether the second prefix is the first and a label more; places without a path hold copies."""
        place = torch.arange(self.labels.shape[2], device=self.labels.device)
        shorter = torch.where(place < (self.counts - 1)[..., None], self.labels, PADDING)
        same = (self.labels[:, :, None] == shorter[:, None]).all(-1)
        there = self.total() > IMPOSSIBLE / 2
        return same & there[:, None] & (self.counts[:, :, None] + 1 == self.counts[:, None])

    def _best(self, in_blank: Tensor, in_label: Tensor, longer: Tensor) -> "_Beams":
        """Of the prefixes as they are and those with a label appended."""
        _, width, classes = longer.shape
        scores = torch.cat([torch.logaddexp(in_blank, in_label), longer.flatten(1)], 1)
        chosen = scores.topk(width, 1)
        grown = chosen.indices >= width
        label, origin = (chosen.indices - width) % classes, (chosen.indices - width).div(classes, rounding_mode="floor")
        origin = torch.where(grown, origin, chosen.indices)
        counts = self.counts.gather(1, origin)
        labels = self.labels.gather(1, origin[..., None].expand(-1, -1, self.labels.shape[2]))
        place = torch.arange(labels.shape[2], device=labels.device)
        labels = torch.where(grown[..., None] & (place == counts[..., None]), label[..., None], labels)
        in_blank = torch.where(grown, IMPOSSIBLE, in_blank.gather(1, origin))
        in_label = torch.where(grown, chosen.values, in_label.gather(1, origin))
        return _Beams(labels, counts + grown, in_blank, in_label)


def edit_distance(labels: Tensor, targets: Tensor, *, padding: int = PADDING) -> Tensor:
    """How many labels must be inserted, removed or replaced to make each text the other (Levenshtein).

    Args:
        labels: (N, T), padded at the end.
        targets: (N, L), padded at the end.
        padding: what follows the last label.

    Returns:
        Whole numbers (N,), int64.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from holofunc.ops import ctc
        >>> ctc.edit_distance(torch.tensor([[1, 2, 3], [1, -100, -100]]), torch.tensor([[1, 3], [2, 1]]))
        tensor([1, 1])
    """
    if labels.ndim != 2 or targets.ndim != 2 or len(labels) != len(targets):
        raise ValueError(
            f"labels and targets must have shapes (N, T) and (N, L), got {tuple(labels.shape)} and "
            f"{tuple(targets.shape)}"
        )
    place = torch.arange(targets.shape[1] + 1, device=labels.device)
    row = place.expand(len(labels), -1)  # distances of nothing to the beginnings of the target
    for t in range(labels.shape[1]):
        there = labels[:, t : t + 1] != padding
        replaced = row[:, :-1] + (targets != labels[:, t : t + 1])
        best = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, replaced)], 1)
        best = (best - place).cummin(1).values + place  # inserting the targets from some place on
        row = torch.where(there, best, row)
    return row.gather(1, (targets != padding).sum(1, keepdim=True)).squeeze(1)


def _check(log_probs: Tensor, lengths: Tensor | None, blank: int) -> None:
    if log_probs.ndim != 3 or log_probs.shape[0] == 0:
        raise ValueError(f"log_probs must have shape (T, N, K) with T at least 1, got {tuple(log_probs.shape)}")
    check_lengths("lengths", lengths, log_probs.shape[1], 0, log_probs.shape[0])
    if not 0 <= blank < log_probs.shape[2]:
        raise ValueError(f"blank must be in [0, {log_probs.shape[2]}), got {blank}")


def check_lengths(name: str, lengths: Tensor | None, count: int, least: int, most: int, unit: str = "") -> None:
    """Raise unless lengths are integers (count,) in [least, most]; their values are read where that costs nothing.

    Args:
        name: how messages call them.
        lengths: what was given; None is fine.
        count: of sequences.
        least: of a sequence.
        most: of a sequence.
        unit: what a length is, for messages.

    Raises:
        TypeError: no integers.
        ValueError: another shape, or one that is out of range.

    Example:
        >>> import torch
        >>> from holofunc.ops.ctc import check_lengths
        >>> check_lengths("lengths", torch.tensor([3, 9]), 2, 1, 8)
        Traceback (most recent call last):
        ...
        ValueError: lengths must be in [1, 8], got 3 to 9
    """
    if lengths is None:
        return
    unit = unit and f", {unit}"
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} must be an integer tensor{unit}, got {got}")
    if lengths.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one for each sequence, got {tuple(lengths.shape)}")
    if lengths.device.type != "cpu" or not tree.is_known(lengths) or lengths.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < least or high > most:
        raise ValueError(f"{name} must be in [{least}, {most}]{unit}, got {low} to {high}")


def _valid(path: Tensor, lengths: Tensor | None) -> Tensor:
    """Which frames (N, T) there are."""
    if lengths is None:
        return torch.ones_like(path, dtype=torch.bool)
    return torch.arange(path.shape[1], device=path.device) < lengths[:, None]
