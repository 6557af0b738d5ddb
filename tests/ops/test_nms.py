"""Suppression of fixed size: torchvision's boxes in its order, alone, batched, mapped and compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holofunc import jit
from holofunc.ops import boxes


def scene(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator)
    sizes = torch.rand(*shape, 2, generator=generator) * 0.4
    scores, labels = torch.rand(*shape, generator=generator), torch.randint(0, 3, shape, generator=generator)
    return torch.cat([low, low + sizes], -1), scores, labels


def listed(kept: boxes.Kept) -> list[int]:
    assert (kept.mask.int().diff() <= 0).all()  # the kept ones come first
    assert (kept.indices[~kept.mask] == 0).all()
    return kept.indices[kept.mask].tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 60),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]),
    ties=st.booleans(),
    limit=st.sampled_from([None, 1, 5, 100]),
)
def test_keeps_torchvisions_boxes_in_its_order(
    seed: int, count: int, threshold: float, ties: bool, limit: int | None
) -> None:
    b, scores, labels = scene(seed, count)
    scores = (3 * scores).round() if ties else scores
    everywhere = torchvision.ops.nms(b, scores, threshold).tolist()
    per_class = one_class_at_a_time(b, scores, labels, threshold)
    assert listed(boxes.nms(b, scores, threshold, max_detections=limit)) == everywhere[:limit]
    assert listed(boxes.nms(b, scores, threshold, labels=labels, max_detections=limit)) == per_class[:limit]
    assert boxes.dynamic_nms(b, scores, threshold).tolist() == everywhere
    assert sorted(boxes.dynamic_nms(b, scores, threshold, labels=labels).tolist()) == sorted(per_class)
    assert boxes.nms(b, scores, threshold, max_detections=limit).indices.shape == (count if limit is None else limit,)


def one_class_at_a_time(b: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    kept = [k for c in range(3) for k in within(b, scores, labels == c, threshold)]
    return sorted(kept, key=lambda i: (-float(scores[i]), i))


def within(b: Tensor, scores: Tensor, members: Tensor, threshold: float) -> list[int]:
    places = members.nonzero().flatten()
    return places[torchvision.ops.nms(b[places], scores[places], threshold)].tolist()


@pytest.mark.parametrize("shape", [(4, 30), (2, 3, 20)])
def test_leading_dimensions_and_vmap_are_a_loop(shape: tuple[int, ...]) -> None:
    b, scores, labels = scene(0, *shape)
    fn = lambda b, s, c: boxes.nms(b, s, 0.2, labels=c, max_detections=7)  # noqa: E731
    batched, mapped = fn(b, scores, labels), fn
    for _ in shape[:-1]:
        mapped = torch.vmap(mapped)
    flat = [x.reshape(-1, *x.shape[len(shape) - 1 :]) for x in (b, scores, labels)]
    loop = [fn(*row) for row in zip(*flat, strict=True)]
    for kept in (batched, mapped(b, scores, labels)):
        assert torch.equal(kept.indices.reshape(-1, 7), torch.stack([k.indices for k in loop]))
        assert torch.equal(kept.mask.reshape(-1, 7), torch.stack([k.mask for k in loop]))


def test_maps_over_boxes_or_scores_alone() -> None:
    b, scores, _ = scene(0, 4, 20)
    fn = partial(boxes.nms, iou_threshold=0.3)
    for dims, args in (
        ((0, None), (b, scores[0])),
        ((None, 0), (b[0], scores)),
        ((1, 1), (b.transpose(0, 1), scores.T)),
    ):
        mapped = torch.vmap(lambda b, s: fn(b, s), in_dims=dims)(*args)
        rows = [fn(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True))) for i in range(4)]
        assert torch.equal(mapped.indices, torch.stack([k.indices for k in rows]))


def test_compiles_whole_alone_and_mapped_with_a_hundred_detections() -> None:
    b, scores, labels = scene(1, 2, 50)
    fn = lambda b, s, c: boxes.nms(b, s, 0.3, labels=c, max_detections=100)  # noqa: E731
    for compiled in (jit(fn), jit(torch.vmap(fn))):
        kept, expected = compiled(b, scores, labels), fn(b, scores, labels)
        assert torch.equal(kept.indices, expected.indices)
        assert torch.equal(kept.mask, expected.mask)


def test_exports_and_runs_on_meta() -> None:
    class Module(torch.nn.Module):
        def forward(self, b: Tensor, scores: Tensor) -> Any:
            return boxes.nms(b, scores, 0.3, max_detections=5)

    b, scores, _ = scene(2, 20)
    assert torch.equal(torch.export.export(Module(), (b, scores)).module()(b, scores)[0], Module()(b, scores)[0])
    assert boxes.nms(b.to("meta"), scores.to("meta"), 0.3).indices.shape == (20,)


def test_the_operator_is_well_behaved() -> None:
    b, scores, _ = scene(2, 6)
    drops = boxes.box_iou(b, b) > 0.3
    torch.library.opcheck(torch.ops.holofunc.take_best.default, (scores, drops, 3))


def test_gradients_flow_through_what_was_picked() -> None:
    b, scores, _ = scene(3, 20)

    def total(b: Tensor, scores: Tensor) -> Tensor:
        kept = boxes.nms(b, scores, 0.3, max_detections=5)
        return (scores[kept.indices] * kept.mask).sum() + b[kept.indices].sum()

    kept = boxes.nms(b, scores, 0.3, max_detections=5)
    to_boxes, to_scores = torch.func.grad(total, argnums=(0, 1))(b, scores)
    assert to_scores.nonzero().flatten().tolist() == sorted(kept.indices.tolist())
    assert (to_boxes[kept.indices] == 1).all()


def test_what_is_never_kept() -> None:
    b = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(5, 1) + torch.arange(5.0)[:, None] * 2
    scores = torch.tensor([0.5, float("-inf"), float("nan"), 0.1, 0.9])
    assert listed(boxes.nms(b, scores, 0.5)) == boxes.dynamic_nms(b, scores, 0.5).tolist() == [4, 0, 3]
    same = b[:1].expand(5, 4)
    assert listed(boxes.nms(same, scores, 0.5)) == boxes.dynamic_nms(same, scores, 0.5).tolist() == [4]
    assert listed(boxes.nms(b, scores, 0.5, score_threshold=0.1)) == [4, 0]
    assert listed(boxes.nms(b, scores, 0.5, score_threshold=2.0)) == []


def test_nothing_of_no_boxes() -> None:
    for labels in (None, torch.zeros(0, dtype=torch.int64)):
        assert boxes.dynamic_nms(torch.zeros(0, 4), torch.zeros(0), 0.5, labels=labels).shape == (0,)


def test_boxes_without_area_are_kept_once() -> None:
    assert listed(boxes.nms(torch.zeros(3, 4), torch.tensor([0.1, 0.3, 0.2]), 0.5)) == [1, 2, 0]


def test_inputs_are_left_alone() -> None:
    b, scores, labels = scene(0, 30)
    copies = b.clone(), scores.clone(), labels.clone()
    boxes.nms(b, scores, 0.1, labels=labels)
    assert all(torch.equal(x, y) for x, y in zip((b, scores, labels), copies, strict=True))


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: boxes.nms(torch.zeros(2, 3), torch.zeros(2), 0.5), r"boxes must have shape \(\.\.\., 4\), got \(2, 3\)"),
    (lambda: boxes.nms(torch.zeros(2, 4), torch.zeros(3), 0.5), r"got \(2, 4\) and \(3,\)"),
    (lambda: boxes.nms(torch.zeros(0, 4), torch.zeros(0), 0.5), r"with N at least 1, got \(0, 4\) and \(0,\)"),
    (lambda: boxes.nms(torch.zeros(1, 4), torch.zeros(1), 1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
    (
        lambda: boxes.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, score_threshold=float("nan")),
        "score_threshold must be a number, got nan",
    ),
    (
        lambda: boxes.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, max_detections=0),
        "max_detections must be an integer of at least 1, got 0",
    ),
    (
        lambda: boxes.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, labels=torch.zeros(2)),
        r"labels must have shape \(1,\), got \(2,\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
