"""Connectionist temporal classification: all paths enumerated, torch, and what torch has no transform for."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import draw
from torch import Tensor

from holofunc import jit, losses

close = torch.testing.assert_close
PAD = -100


def spelled(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("text", [[1], [1, 1], [1, 3, 1], [3, 1]])
def test_is_the_sum_over_all_paths(blank: int, text: list[int]) -> None:
    logits = draw(4, 1, 4)
    p = logits[:, 0].softmax(-1).tolist()
    paths = itertools.product(range(4), repeat=4)
    total = sum(math.prod(p[t][k] for t, k in enumerate(path)) for path in paths if spelled(path, blank) == tuple(text))
    close(losses.ctc(logits, torch.tensor([text]), blank=blank, reduction="sum").item(), -math.log(total))


def scene(blank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, targets, input lengths, target lengths: repeats, an empty text, and one that does not fit."""
    frames, count, classes = 12, 6, 5
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, classes - 1, (count, 5), generator=generator)
    targets = targets + (targets >= blank)
    targets[1] = targets[1, 0]
    return draw(frames, count, classes), targets, torch.tensor([12, 12, 9, 7, 12, 4]), torch.tensor([5, 5, 3, 1, 0, 5])


@pytest.mark.parametrize("blank", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_is_torchs(blank: int, reduction: str, zero_infinity: bool) -> None:
    logits, targets, inputs, lengths = scene(blank)

    def ours(x: Tensor) -> Tensor:
        return losses.ctc(
            x, targets, input_lengths=inputs, target_lengths=lengths, blank=blank, reduction=reduction,
            zero_infinity=zero_infinity,
        )  # fmt: skip

    def expected(x: Tensor) -> Tensor:
        return F.ctc_loss(
            x.log_softmax(-1), targets, inputs, lengths, blank, reduction=reduction, zero_infinity=zero_infinity
        )

    close(ours(logits), expected(logits))
    if zero_infinity:
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(expected(x).sum(), x)
        close(torch.func.grad(lambda x: ours(x).sum())(logits), gradient)


def test_is_torchs_on_long_sequences_in_single_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(80, 8, 30, generator=generator)
    targets = torch.randint(1, 30, (8, 20), generator=generator)
    full = torch.full((8,), 80), torch.full((8,), 20)
    x = logits.clone().requires_grad_()
    expected = F.ctc_loss(x.log_softmax(-1), targets, *full)
    (gradient,) = torch.autograd.grad(expected, x)
    ours_gradient, ours = torch.func.grad_and_value(losses.ctc)(logits, targets)
    close(ours, expected)
    close(ours_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_padding_says_the_same_as_lengths() -> None:
    logits, targets, inputs, lengths = scene(0)
    shown = torch.arange(5) < lengths[:, None]
    for padding in (PAD, -1, 255):
        padded = torch.where(shown, targets, padding)
        for reduction in ("sum", "none"):
            options: dict[str, Any] = {"input_lengths": inputs, "reduction": reduction, "ignore_index": padding}
            each = losses.ctc(logits, padded, **options)
            expected = losses.ctc(logits, targets, target_lengths=lengths, **options)
            if reduction == "none":  # a row of padding only is ignored; a length of 0 is an empty text
                assert each[4] == 0
                assert expected[4] > 0
                each[4] = expected[4]
                close(each, expected)


def test_frames_beyond_the_length_have_no_gradient() -> None:
    logits, targets, inputs, lengths = scene(0)
    options = {"input_lengths": inputs, "target_lengths": lengths}
    gradient = torch.func.grad(lambda x: losses.ctc(x, targets, **options))(logits)
    late = torch.arange(len(logits))[:, None] >= inputs
    assert (gradient[late] == 0).all()
    assert (gradient[0, :4].abs().sum(-1) > 0).all()
    assert (gradient[:, 5] == 0).all()  # does not fit


def test_frames_behind_the_length_may_hold_anything() -> None:
    logits, targets, inputs, lengths = scene(0)
    late = torch.arange(len(logits))[:, None] >= inputs
    options = {"input_lengths": inputs, "target_lengths": lengths}
    expected = torch.func.grad_and_value(lambda x: losses.ctc(x, targets, **options))(logits)
    for rubbish in (torch.nan, torch.inf, -torch.inf):
        filled = torch.where(late[..., None], rubbish, logits)
        found = torch.func.grad_and_value(lambda x: losses.ctc(x, targets, **options))(filled)
        for x, y in zip(found, expected, strict=True):
            close(x, y)


def test_weights_are_those_of_the_labels() -> None:
    logits, targets, _, _ = scene(0)
    targets[2, 3:] = PAD
    weight = torch.tensor([9.0, 0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    each = losses.ctc(logits, targets, reduction="none")
    own = torch.stack([weight[row[row != PAD]].mean() for row in targets])
    close(losses.ctc(logits, targets, weight=weight, reduction="none"), own * each)
    counts = (targets != PAD).sum(1)
    close(losses.ctc(logits, targets, weight=weight), (own * each / counts).sum() / own.sum())


def test_mapped_over_samples_and_compiled() -> None:
    logits, targets, inputs, lengths = scene(0)

    def one(x: Tensor, t: Tensor, input_length: Tensor, length: Tensor) -> Tensor:
        return losses.ctc(x, t, input_lengths=input_length, target_lengths=length, reduction="sum")

    args = logits.transpose(0, 1), targets, inputs, lengths
    each = losses.ctc(logits, targets, input_lengths=inputs, target_lengths=lengths, reduction="none")
    close(torch.vmap(one)(*args), each)
    mapped = torch.vmap(torch.func.grad(one))
    whole = torch.func.grad(
        lambda x: losses.ctc(x, targets, input_lengths=inputs, target_lengths=lengths, reduction="sum")
    )(logits)
    close(mapped(*args), whole.transpose(0, 1))
    close(jit(mapped)(*args), mapped(*args))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((draw(3, 2), torch.tensor([[1]])), {}, r"targets must have shape \(L,\)"),
        ((draw(3, 2, 4), torch.tensor([1, 2])), {}, r"got \(3, 2, 4\) and \(2,\)"),
        ((draw(3, 2, 4), torch.zeros(2, 0, dtype=torch.int64)), {}, "with L at least 1"),
        ((draw(3, 2, 4), torch.ones(2, 1, dtype=torch.int64)), {"blank": 4}, r"blank must be in \[0, 4\), got 4"),
        ((draw(3, 2, 4), torch.ones(2, 1, dtype=torch.int64)), {"weight": torch.ones(3)}, r"weight must have shape"),
        ((draw(3, 2, 4), torch.ones(2, 1).long()), {"input_lengths": torch.tensor([3, 4])}, r"input_lengths must be in \[1, 3\], got 3 to 4"),
        ((draw(3, 2, 4), torch.ones(2, 1).long()), {"input_lengths": torch.tensor([3])}, r"input_lengths must have shape \(2,\)"),
        ((draw(3, 2, 4), torch.ones(2, 1).long()), {"target_lengths": torch.tensor([0, 2])}, r"target_lengths must be in \[0, 1\]"),
        ((draw(3, 2, 4), torch.tensor([[1], [4]])), {}, r"targets must be labels in \[0, 4\) other than blank=0, got 4"),
        ((draw(3, 2, 4), torch.tensor([[1], [0]])), {}, r"other than blank=0, got 0"),
    ],
)  # fmt: skip
def test_refuses(arguments: tuple[Tensor, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.ctc(*arguments, **options)
