"""Merged convolutions are the branches they were merged from, to rounding in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import draw
from torch import Tensor, nn

from holofunc.ops import reparam

KINDS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with generic parameters and statistics."""
    module = module.double().eval()
    for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
        if tensor.is_floating_point():
            tensor.data.copy_(draw(*tensor.shape, seed=seed + i))
    for part in module.modules():
        if hasattr(part, "running_var"):
            part.running_var.abs_().add_(0.1)
    return module


def load(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    module.double().eval().load_state_dict(values)
    return module


def same(merged: nn.Module, expected: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.testing.assert_close(merged(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_and_its_normalization(dims: int, bias: bool, affine: bool, groups: int) -> None:
    conv_kind, norm_kind = KINDS[dims]
    conv = filled(conv_kind(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias))
    norm = filled(norm_kind(6, eps=1e-3, affine=affine), seed=10)
    before = {n: t.clone() for n, t in conv.state_dict().items()}
    merged = reparam.fuse_conv_bn(conv.state_dict(), norm.state_dict(), eps=1e-3)
    fused = load(conv_kind(4, 6, 3, stride=2, padding=1, groups=groups), merged)
    same(fused, lambda x: norm(conv(x)), draw(2, 4, *[7] * dims, seed=20))
    assert all(torch.equal(t, before[n]) for n, t in conv.state_dict().items())


def test_a_linear_layer_and_its_normalization() -> None:
    linear, norm = filled(nn.Linear(5, 3)), filled(nn.BatchNorm1d(3), seed=5)
    fused = load(nn.Linear(5, 3), reparam.fuse_conv_bn(linear.state_dict(), norm.state_dict()))
    same(fused, lambda x: norm(linear(x)), draw(4, 5))


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_parallel_branches_of_several_kernels_and_an_identity(groups: int, stride: int) -> None:
    def conv(size: int | tuple[int, int], seed: int, bias: bool) -> nn.Module:
        pads = (size // 2,) * 2 if isinstance(size, int) else tuple(n // 2 for n in size)
        return filled(nn.Conv2d(6, 6, size, stride=stride, padding=pads, groups=groups, bias=bias), seed)

    branches = [conv(1, 0, True), conv(3, 1, False), conv(5, 2, True), conv((1, 5), 3, True), conv((3, 1), 4, False)]
    norms = [filled(nn.BatchNorm2d(6), seed=10 * i) for i in range(6)]
    convs = [
        *(reparam.fuse_conv_bn(b.state_dict(), n.state_dict()) for b, n in zip(branches, norms[1:], strict=True)),
        reparam.fuse_conv_bn(reparam.identity_conv(6, groups=groups, dtype=torch.float64), norms[0].state_dict()),
    ]
    merged = load(nn.Conv2d(6, 6, 5, stride=stride, padding=2, groups=groups), reparam.merge_branches(convs))

    def whole(x: Tensor) -> Tensor:
        return norms[0](x[..., ::stride, ::stride]) + sum(n(b(x)) for b, n in zip(branches, norms[1:], strict=True))

    same(merged, whole, draw(2, 6, 9, 8, seed=30))


@pytest.mark.parametrize(("groups", "dims"), [(1, 2), (2, 1), (4, 3)])
def test_the_identity_changes_nothing(groups: int, dims: int) -> None:
    x = draw(2, 4, *[5] * dims)
    weight = reparam.identity_conv(4, groups=groups, spatial_dims=dims, dtype=torch.float64)
    conv = load(KINDS[dims][0](4, 4, 1, groups=groups, bias=False), weight)
    torch.testing.assert_close(conv(x), x, rtol=0, atol=0)


def test_branches_without_biases_have_none() -> None:
    branch = {"weight": draw(2, 2, 3, 3)}
    merged = reparam.merge_branches([branch, reparam.identity_conv(2, dtype=torch.float64)])
    assert set(merged) == {"weight"}


def test_a_merged_branch_can_be_mapped_and_differentiated() -> None:
    conv, norm = filled(nn.Conv2d(4, 6, 3)), filled(nn.BatchNorm2d(6), seed=9)
    weights = {n: t.detach() for n, t in conv.state_dict().items()}
    statistics = {n: t.detach() for n, t in norm.state_dict().items() if n != "num_batches_tracked"}
    fuse = lambda w, s: reparam.fuse_conv_bn(w, s)["weight"]  # noqa: E731
    stacked = [{n: torch.stack([t, 2 * t]) for n, t in tree.items()} for tree in (weights, statistics)]
    torch.testing.assert_close(torch.vmap(fuse)(*stacked)[0], fuse(weights, statistics))
    gradient = torch.func.grad(lambda w: fuse(w, statistics).sum())(weights)["weight"]
    scale = (statistics["running_var"] + 1e-5).rsqrt() * statistics["weight"]
    torch.testing.assert_close(gradient, scale.view(-1, 1, 1, 1).expand_as(gradient))
    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, statistics), fuse(weights, statistics))


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: reparam.fuse_conv_bn(
            {"weight": torch.ones(3, 2, 1, 1)}, {"running_mean": torch.ones(2), "running_var": torch.ones(2)}
        ),
        r"bn must have as many channels as conv has outputs, 3, got \(2,\)",
    ),
    (lambda: reparam.identity_conv(4, groups=3), "groups must divide channels, got groups=3, channels=4"),
    (lambda: reparam.pad_kernel(torch.ones(1, 1, 2, 2), (3, 3)), r"by an even number, got \(3, 3\) for \(2, 2\)"),
    (lambda: reparam.pad_kernel(torch.ones(1, 1, 5, 5), (3, 3)), r"by an even number, got \(3, 3\) for \(5, 5\)"),
    (lambda: reparam.merge_branches([]), "branches must be one or more convolutions of the same channels"),
    (
        lambda: reparam.merge_branches([reparam.identity_conv(2), reparam.identity_conv(4)]),
        r"of the same channels, got \[\(2, 2\), \(4, 4\)\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
