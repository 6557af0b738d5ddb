"""Losses of sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import tree
from holofunc.losses.contract import Reduction, Weight, check_label_dtype, check_logits, class_weights
from holofunc.losses.reduction import reduce
from holofunc.ops.arithmetic import safe_divide, upcast
from holofunc.ops.ctc import check_lengths

__all__ = ["ctc"]

IMPOSSIBLE = -1e30  # a log-probability that adds nothing and, unlike -inf, has finite derivatives


def ctc(
    logits: Tensor,
    targets: Tensor,
    *,
    input_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    blank: int = 0,
    zero_infinity: bool = True,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
) -> Tensor:
    """Connectionist temporal classification: the negative log-likelihood of a label sequence, over all alignments.

    loss = -log sum over all paths of length T that spell the targets once repeats are merged and blanks dropped, of
    prod_t softmax(logits_t)[path_t]. The sum is the forward recursion over the targets with blanks in between,
    alpha_t(s) = p_t(s) (alpha_{t-1}(s) + alpha_{t-1}(s-1) + alpha_{t-1}(s-2) unless s is a blank or repeats s-2), in
    log space; one step per frame, so that it can be differentiated twice, forward, and vmapped. Compiled, the graph
    grows with T (one to two seconds of compilation per frame): it pays for short sequences of one length.

    Args:
        logits: shape (T, N, K), frames first as in torch, or (T, K) for one unbatched sequence.
        targets: labels other than ``blank``, shape (N, L) or (L,), an integer dtype, padded at the end with
            ``ignore_index``. A row of padding only is ignored.
        input_lengths: number of valid frames, shape (N,) or (), in [1, T]; T where None.
        target_lengths: number of labels, shape (N,) or (), in [0, L], instead of padding; 0 is an empty text.
        blank: the class that stands for no label.
        zero_infinity: targets that do not fit in the frames (labels plus repeats exceed them), or that logits of -inf
            exclude, cost 0 and have no gradient; False: they cost infinity.
        reduction: "mean" divides each loss by its number of labels first, as torch does; "sum" or "none" do not.
        weight: class weights, shape (K,); a sequence's weight is the mean of those of its labels.
        ignore_index: the padding.

    Returns:
        A 0-d tensor; for "none", shape (N,). At least float32.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the shapes do not fit, the batch is empty, or blank, a length or a label is out of range (their
            values are read on a CPU only).

    Source: Graves et al., "Connectionist Temporal Classification" (ICML 2006). Equal to
        `torch.nn.functional.ctc_loss` of log_softmax(logits), except that zero_infinity is on by default.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.ctc(torch.zeros(2, 1, 2), torch.tensor([[1]]))  # 3 of the 4 paths spell it: -log 3/4
        tensor(0.2877)
    """
    if logits.ndim == 2:
        if targets.ndim != 1:
            raise ValueError(f"targets must have shape (L,) for logits of shape (T, K), got {tuple(targets.shape)}")
        loss = ctc(
            logits[:, None],
            targets[None],
            input_lengths=None if input_lengths is None else input_lengths[None],
            target_lengths=None if target_lengths is None else target_lengths[None],
            blank=blank,
            zero_infinity=zero_infinity,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
        )
        return loss[0] if reduction == "none" else loss
    if logits.ndim != 3 or targets.ndim != 2 or targets.shape[0] != logits.shape[1] or targets.shape[1] == 0:
        raise ValueError(
            "logits and targets must have shapes (T, N, K) and (N, L) with L at least 1, got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    frames, _, num_classes = logits.shape
    check_logits(logits)
    check_label_dtype(targets)
    weight = class_weights(weight, num_classes, logits)
    check_lengths("input_lengths", input_lengths, len(targets), 1, frames)
    check_lengths("target_lengths", target_lengths, len(targets), 0, targets.shape[1])
    if not 0 <= blank < num_classes:
        raise ValueError(f"blank must be in [0, {num_classes}), got {blank}")

    targets = targets.long()
    available = torch.full_like(targets[:, 0], frames) if input_lengths is None else input_lengths
    there = torch.arange(frames, device=logits.device)[:, None] < available  # behind them may be anything
    logp = torch.log_softmax(torch.where(there[..., None], upcast(logits), 0), -1).clamp_min(IMPOSSIBLE)
    if target_lengths is None:
        spoken = targets != ignore_index
        scored = spoken.any(1)
    else:
        spoken = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
        scored = torch.ones_like(target_lengths, dtype=torch.bool)
    _check_labels(targets, spoken, num_classes, blank)
    labels = torch.where(spoken, targets, blank)
    lengths = spoken.sum(1)
    repeats = (spoken[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(1)
    fits = lengths + repeats <= available

    likelihood = _forward(logp, labels, lengths, available, blank)
    fits = fits & (likelihood > IMPOSSIBLE / 2)  # else logits of -inf leave no path
    losses = torch.where(fits & scored, -likelihood, 0)
    if not zero_infinity:
        losses = torch.where(fits | ~scored, losses, torch.inf)
    mass = scored.to(logp.dtype)
    if weight is not None:
        of_labels = weight.to(logp.dtype).expand(labels.shape[0], -1).gather(1, labels) * spoken
        mass = mass * torch.where(lengths > 0, safe_divide(of_labels.sum(1), lengths), 1)
    losses = losses * mass if zero_infinity else torch.where(mass > 0, losses * mass, 0)
    return reduce(losses / lengths.clamp_min(1) if reduction in ("mean", "parts") else losses, mass, reduction)


def _check_labels(targets: Tensor, spoken: Tensor, num_classes: int, blank: int) -> None:
    """Raise for labels that there are not, where reading them costs nothing."""
    if targets.device.type != "cpu" or not (tree.is_known(targets) and tree.is_known(spoken)):
        return
    wrong = targets[spoken & ((targets < 0) | (targets >= num_classes) | (targets == blank))]
    if len(wrong):
        raise ValueError(f"targets must be labels in [0, {num_classes}) other than blank={blank}, got {int(wrong[0])}")


def _forward(logp: Tensor, labels: Tensor, lengths: Tensor, available: Tensor, blank: int) -> Tensor:
    """The log-likelihood of each row's labels, from the recursion over labels and the blanks around them."""
    symbols = F.pad(torch.stack([torch.full_like(labels, blank), labels], -1).flatten(1), (0, 1), value=blank)
    emissions = logp.gather(2, symbols.expand(logp.shape[0], *symbols.shape))
    jumps = F.pad((symbols[:, 2:] != blank) & (symbols[:, 2:] != symbols[:, :-2]), (2, 0))
    alpha = torch.where(torch.arange(symbols.shape[1], device=logp.device) < 2, emissions[0], IMPOSSIBLE)
    for t in range(1, logp.shape[0]):
        step = F.pad(alpha[:, :-1], (1, 0), value=IMPOSSIBLE)
        jump = torch.where(jumps, F.pad(alpha[:, :-2], (2, 0), value=IMPOSSIBLE), IMPOSSIBLE)
        moved = _log_sum_exp(alpha, step, jump) + emissions[t]
        alpha = torch.where((t < available)[:, None], moved, alpha)
    end = 2 * lengths[:, None]
    at_label = torch.where(end > 0, alpha.gather(1, (end - 1).clamp_min(0)), IMPOSSIBLE)
    return _log_sum_exp(alpha.gather(1, end), at_label).squeeze(1)


def _log_sum_exp(*terms: Tensor) -> Tensor:
    """log sum_i exp(term_i), whose derivatives stay weights that sum to 1 where torch's round to 1 each."""
    stacked = torch.stack(terms)
    shift = stacked.amax(0).detach()
    return (stacked - shift).exp().sum(0).log() + shift
