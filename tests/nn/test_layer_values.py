"""What each layer computes: closed forms, hand-made cases, invariances, and pylocron where it is right."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from holofunc import lift, nn, random
from holofunc.nn import functional

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pylocron compiles a torch.jit class when it is imported
    import holocron.nn
    import holocron.nn.functional

close = torch.testing.assert_close


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random.normal(random.key(seed), shape, dtype=dtype)


def run(layer: torch.nn.Module | Callable[..., torch.nn.Module], x: Tensor, *args: Any, **options: Any) -> Tensor:
    """The output in eval mode of a layer lifted with these arguments, with parameters from key 0."""
    model = lift(layer, *args, **options)
    params, buffers = model.init(random.key(0), dtype=x.dtype)
    return model.apply(params, buffers, x)[0]


# --- pylocron ----------------------------------------------------------------------------------------------------

SAME: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("HardMish", (), {}),
    ("NLReLU", (0.7,), {}),
    ("FReLU", (16,), {}),
    ("SAM", (16,), {}),
    ("TripletAttention", (), {}),
    ("NormConv2d", (16, 8, 3), {"padding": 1, "stride": 2}),
    ("NormConv2d", (16, 8, 3), {"padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False}),
    ("Add2d", (16, 8, 3), {"padding": 1}),
    ("Add2d", (16, 8, 3), {"normalize_slices": True, "stride": 2, "padding": 1, "padding_mode": "circular"}),
    ("SlimConv2d", (16, 3), {"padding": 1, "stride": 2, "groups": 2, "bias": False, "r": 2}),
    ("PyConv2d", (16, 16, 3), {"num_levels": 4, "padding": 1, "stride": 2}),
    ("PyConv2d", (16, 16, 3), {"num_levels": 3, "padding": 1, "groups": [1, 2, 4]}),
    ("Involution2d", (16, 3), {"padding": 1, "groups": 4, "reduction_ratio": 2}),
    ("Involution2d", (16, 5), {"padding": 2, "stride": 2, "groups": 2}),
    ("LambdaLayer", (16, 8, 4), {"r": 3, "dim_u": 2}),
    ("LambdaLayer", (16, 8, 4), {"n": 144, "num_heads": 2}),
    ("ConcatDownsample2d", (3,), {}),
    ("GlobalAvgPool2d", (True,), {}),
    ("GlobalMaxPool2d", (), {}),
    ("BlurPool2d", (16,), {}),
    ("BlurPool2d", (16, 4, 1), {}),
    ("BlurPool2d", (16, 5, 3), {}),
    ("SPP", ([5, 9, 3],), {}),
    ("ZPool", (2,), {}),
]


@pytest.mark.parametrize(("name", "args", "options"), SAME, ids=lambda v: str(v))
def test_equals_pylocron(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    theirs = getattr(holocron.nn, name)(*args, **options).eval()
    for i, buffer in enumerate(theirs.buffers()):
        if buffer.is_floating_point():
            buffer.copy_(random.uniform(random.key(i), buffer.shape, low=0.5, high=2.0))
    model = lift(getattr(nn, name), *args, **options)
    state = theirs.state_dict()
    assert {n: t.shape for n, t in model.skeleton.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert list(model.skeleton.state_dict()) == list(state)
    params = {n: p.detach() for n, p in theirs.named_parameters()}
    x = draw(3, 2, 16, 12, 12, dtype=torch.float32)
    ours, _ = model.apply(params, dict(theirs.named_buffers()), x)
    expected = theirs(x).detach()
    close(ours, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# --- activations -------------------------------------------------------------------------------------------------


def test_hard_mish_in_pieces() -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    pieces = torch.where(x <= -2, 0.0, torch.where(x >= 0, x, x * (x + 2) / 2))
    close(functional.hard_mish(x), pieces)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_nl_relu(beta: float) -> None:
    x = torch.tensor([-2.0, 0.0, 1.0, 100.0], dtype=torch.float64)
    close(functional.nl_relu(x, beta), torch.tensor([0.0, 0.0, math.log(1 + beta), math.log(1 + 100 * beta)]).double())


def test_frelu_without_convolution_is_a_maximum() -> None:
    model = lift(nn.FReLU, 2)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    params |= {"conv.weight": torch.zeros(2, 1, 3, 3), "conv.bias": torch.zeros(2), "bn.bias": torch.tensor([0.0, 1.0])}
    x = draw(0, 2, 2, 4, 4)
    close(
        model.apply({n: p.double() for n, p in params.items()}, buffers, x)[0],
        torch.stack([x[:, 0].clamp_min(0), x[:, 1].clamp_min(1)], 1),
    )


# --- attention ---------------------------------------------------------------------------------------------------


def test_attention_without_weights_halves() -> None:
    x = draw(0, 2, 3, 4, 5)
    for layer, args in ((nn.SAM, (3,)), (nn.TripletAttention, ())):
        model = lift(layer, *args)
        params, buffers = model.init(random.key(0), dtype=torch.float64)
        zeros = {n: torch.zeros_like(p) for n, p in params.items()}
        close(model.apply(zeros, buffers, x)[0], x / 2)


@pytest.mark.parametrize(("branch", "dim"), [("c_branch", 1), ("h_branch", 2), ("w_branch", 3)])
def test_a_triplet_branch_gates_the_other_two_dimensions(branch: str, dim: int) -> None:
    model = lift(nn.TripletAttention)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    params = {n: p if n.startswith(branch) else torch.zeros_like(p) for n, p in params.items()}
    x = draw(0, 2, 3, 4, 5)
    gates = model.apply(params, buffers, x)[0] / x
    close(gates, gates.narrow(dim, 0, 1).expand_as(gates))
    for other in {1, 2, 3} - {dim}:
        assert not torch.allclose(gates, gates.narrow(other, 0, 1).expand_as(gates))


def test_local_lambdas_are_global_ones_whose_embedding_depends_on_the_offset() -> None:
    height, width, r = 4, 5, 3
    local = lift(nn.LambdaLayer, 6, 8, 3, r=r, num_heads=2, dim_u=2)
    everywhere = lift(nn.LambdaLayer, 6, 8, 3, n=height * width, num_heads=2, dim_u=2)
    params, buffers = local.init(random.key(0), dtype=torch.float64)
    kernel = params["R"]
    embedding = torch.zeros(height, width, height, width, 3, 2, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for di in range(r):
                for dj in range(r):
                    row, column = i + di - r // 2, j + dj - r // 2
                    if 0 <= row < height and 0 <= column < width:
                        embedding[i, j, row, column] = kernel[:, :, 0, di, dj]
    shared = {n: p for n, p in params.items() if n != "R"}
    x = draw(1, 2, 6, height, width)
    expected = everywhere.apply({"pos_emb": embedding.view(20, 20, 3, 2), **shared}, buffers, x)[0]
    close(local.apply(params, buffers, x)[0], expected)


def test_lambdas_without_positions_do_not_see_order() -> None:
    model = lift(nn.LambdaLayer, 6, 8, 3, r=3)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    params["R"] = torch.zeros_like(params["R"])
    x = draw(1, 2, 6, 4, 5)
    order = random.permutation(random.key(2), 20)
    shuffle = lambda t: t.flatten(2)[..., order].view_as(t)  # noqa: E731
    close(model.apply(params, buffers, shuffle(x))[0], shuffle(model.apply(params, buffers, x)[0]))


# --- convolutions ------------------------------------------------------------------------------------------------

geometry = st.fixed_dictionaries(
    {
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
    }
)
sizes = st.tuples(st.integers(6, 9), st.integers(6, 9))
kernels = st.tuples(st.integers(1, 3), st.integers(1, 3))


def patches(x: Tensor, size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    return F.unfold(x, size, dilation, padding, stride).unflatten(1, (groups, -1))


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-14).sqrt()


@settings(max_examples=40, deadline=None)
@given(size=sizes, kernel=kernels, options=geometry)
def test_norm_conv2d_is_the_product_with_standardized_patches(
    size: tuple[int, int], kernel: tuple[int, int], options: dict[str, int]
) -> None:
    x, weight, bias = draw(0, 2, 4, *size), draw(1, 6, 4 // options["groups"], *kernel), draw(2, 6)
    filters = weight.flatten(1).unflatten(0, (options["groups"], -1))
    expected = torch.einsum("goj,ngjl->ngol", filters, standardized(patches(x, kernel, **options))).flatten(1, 2)
    shape = F.conv2d(x, weight, **options).shape
    close(functional.norm_conv2d(x, weight, bias, **options), expected.view(shape) + bias.view(-1, 1, 1))


@settings(max_examples=40, deadline=None)
@given(size=sizes, kernel=kernels, options=geometry, normalize=st.booleans())
def test_add2d_is_the_distance_to_patches(
    size: tuple[int, int], kernel: tuple[int, int], options: dict[str, int], normalize: bool
) -> None:
    x, weight, bias = draw(0, 2, 4, *size), draw(1, 6, 4 // options["groups"], *kernel), draw(2, 6)
    filters = weight.flatten(1).unflatten(0, (options["groups"], -1))
    p = patches(x, kernel, **options)
    p = standardized(p) if normalize else p
    expected = -(p[:, :, None] - filters[..., None]).abs().sum(3).flatten(1, 2)
    shape = F.conv2d(x, weight, **options).shape
    ours = functional.add2d(x, weight, bias, **options, normalize_slices=normalize)
    close(ours, expected.view(shape) + bias.view(-1, 1, 1))


@settings(max_examples=40, deadline=None)
@given(size=sizes, kernel=st.integers(1, 4), options=geometry)
def test_involution2d_with_one_kernel_everywhere_is_a_convolution(
    size: tuple[int, int], kernel: int, options: dict[str, int]
) -> None:
    x, weight = draw(0, 2, 4, *size), draw(1, options["groups"], kernel, kernel)
    groups = options.pop("groups")
    depthwise = weight.repeat_interleave(4 // groups, 0)[:, None]
    if min(size) + 2 * options["padding"] < options["dilation"] * (kernel - 1) + 1:
        return
    expected = F.conv2d(x, depthwise, groups=4, **options)
    everywhere = weight.flatten().view(1, -1, 1, 1).expand(2, -1, *expected.shape[2:])
    close(functional.involution2d(x, everywhere, groups=groups, **options), expected)
    layer = nn.Involution2d(4, kernel, groups=groups, **options).double()
    with torch.no_grad():
        layer.span.weight.zero_()
        layer.span.bias.copy_(weight.flatten())
    close(layer(x), expected)


def test_an_involution_reads_its_kernels_at_the_centres() -> None:
    x = draw(0, 1, 2, 7, 7)
    close(nn.Involution2d(2, 3, 1).centers(x), x)
    close(nn.Involution2d(2, 3, 0).centers(x), x[..., 1:-1, 1:-1])
    close(nn.Involution2d(2, 5, 0, dilation=1).centers(x), x[..., 2:-2, 2:-2])
    strided = nn.Involution2d(2, 3, 1, stride=2).centers(x)
    assert strided.shape[2:] == (4, 4)
    close(strided[..., :3, :3], F.avg_pool2d(x, 2))
    close(strided[..., 3, 3], x[..., 6, 6])


@pytest.mark.parametrize("name", ["norm_conv2d", "add2d"])
def test_patches_do_not_see_contrast_or_brightness(name: str) -> None:
    x, weight = draw(0, 2, 4, 6, 6), draw(1, 3, 4, 3, 3)
    fn = partial(functional.add2d, normalize_slices=True) if name == "add2d" else functional.norm_conv2d
    close(fn(3.0 * x + 5.0, weight), fn(x, weight))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_norm_conv2d_sees_a_faint_contrast(offset: float) -> None:
    x, weight = offset + draw(0, 1, 16, 6, 6), draw(1, 8, 16, 3, 3)
    exact = functional.norm_conv2d(x.float().double(), weight)
    close(functional.norm_conv2d(x.float(), weight.float()).double(), exact, rtol=0, atol=0.02 * float(exact.std()))


def test_norm_conv2d_has_no_answer_to_a_constant_image() -> None:
    """Rounding errors stay small; pylocron divides them by sqrt(1e-14) and returns numbers of magnitude 1."""
    weight = draw(1, 8, 16, 3, 3, dtype=torch.float32)
    for value in (0.0, 0.1, 7.3, 1e4):
        x = torch.full((1, 16, 6, 6), value)
        assert functional.norm_conv2d(x, weight).abs().max() < 0.05
    theirs = holocron.nn.functional.norm_conv2d(torch.full((1, 16, 6, 6), 7.3), weight)
    assert theirs.abs().max() > 0.5


def test_normalizing_layers_differentiate_to_their_input_where_pylocron_raises() -> None:
    x, weight = draw(0, 2, 4, 6, 6).requires_grad_(), draw(1, 3, 4, 3, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        holocron.nn.functional.norm_conv2d(x * 1.0, weight).sum().backward()
    functional.norm_conv2d(x * 1.0, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("normalize", [False, True])
def test_add2d_never_holds_all_differences(normalize: bool) -> None:
    x, weight = draw(0, 2, 8, 10, 10).requires_grad_(), draw(1, 32, 8, 3, 3).requires_grad_()
    all_patches = 2 * 8 * 9 * 100
    with Largest() as ours:
        functional.add2d(x, weight, padding=1, normalize_slices=normalize).sum().backward()
    with Largest() as theirs:
        holocron.nn.functional.add2d(x.detach(), weight, padding=1, normalize_slices=normalize).sum().backward()
    assert ours.numel == all_patches
    assert theirs.numel == 32 * all_patches


def test_pyconv2d_levels() -> None:
    layer = nn.PyConv2d(16, 32, 3, 3, padding=1)
    assert [(c.kernel_size[0], c.out_channels, c.groups) for c in layer] == [(3, 8, 1), (5, 8, 4), (7, 16, 8)]
    x = draw(0, 2, 16, 9, 9, dtype=torch.float32)
    close(layer(x), torch.cat([conv(x) for conv in layer], 1))
    assert nn.PyConv2d(16, 32, 3, 3, padding=2, dilation=2)(x).shape == (2, 32, 9, 9)


def test_slimconv2d_folds_the_flipped_weights() -> None:
    model = lift(nn.SlimConv2d, 8, 1)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    params |= {
        n: torch.zeros_like(params[n]) for n in params if n.startswith(("fc1", "fc2.weight")) or n.endswith("bias")
    }
    params["fc2.bias"] = torch.tensor([100.0] * 4 + [-100.0] * 4, dtype=torch.float64)  # attention 1 and 0
    params["conv_top.weight"] = torch.eye(4, dtype=torch.float64)[..., None, None]
    params["conv_bot1.weight"] = torch.eye(4, dtype=torch.float64)[:2, :, None, None]
    params["conv_bot2.weight"] = torch.eye(2, dtype=torch.float64)[..., None, None]
    x = draw(0, 2, 8, 3, 3)
    close(model.apply(params, buffers, x)[0], torch.cat([x[:, :4], x[:, 4:6]], 1))


# --- pooling and downsampling ------------------------------------------------------------------------------------


def test_space_to_depth() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    out = functional.concat_downsample2d(x, 2)
    for i in range(2):
        for j in range(2):
            close(out[:, 3 * (2 * i + j) : 3 * (2 * i + j) + 3], x[:, :, i::2, j::2])
    close(out, F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2))


def test_global_pools_are_adaptive_pools_of_one_pixel() -> None:
    x = draw(0, 2, 3, 5, 4)
    close(functional.global_avg_pool2d(x), F.adaptive_avg_pool2d(x, 1))
    close(functional.global_max_pool2d(x), F.adaptive_max_pool2d(x, 1), rtol=0, atol=0)
    assert functional.global_max_pool2d(x, flatten=True).shape == (2, 3)


def test_z_pool() -> None:
    x = torch.tensor([[[1.0, 2.0], [5.0, -2.0]]])
    close(functional.z_pool(x), torch.tensor([[[5.0, 2.0], [3.0, 0.0]]]))


def test_spatial_pyramid() -> None:
    x = draw(0, 2, 3, 20, 17)
    expected = torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (13, 5, 9, 5, 1))], 1)
    close(functional.spatial_pyramid_pool2d(x, (13, 5, 9, 5, 1)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_a_blur_keeps_constants_and_removes_the_finest_grating(size: int) -> None:
    kernel = functional.binomial_kernel2d(size)
    close(kernel.sum(), torch.tensor(1.0))
    close(kernel, kernel.mT)
    flat = torch.full((1, 2, 12, 12), 0.7)
    for stride in (1, 2, 3):
        out = functional.blur_pool2d(flat, kernel, stride)
        close(out, torch.full_like(out, 0.7))
    stripes = torch.arange(12).remainder(2).float().expand(1, 1, 12, 12)
    inside = functional.blur_pool2d(stripes, kernel, 2)[..., 2:-2, 2:-2]
    close(inside, torch.full_like(inside, 0.5))


def test_a_blur_pool_moves_with_its_filter() -> None:
    layer = nn.BlurPool2d(3)
    assert layer.to(torch.float64) is layer
    assert layer.kernel.dtype == torch.float64
    assert layer.state_dict() == {}
    assert layer(draw(0, 1, 3, 5, 5)).shape == (1, 3, 3, 3)


# --- randomness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "block", "p", "per_channel"),
    [
        ((28, 28), 7, 0.1, False),
        ((14, 14), 7, 0.1, True),
        ((7, 7), 7, 0.3, False),
        ((4, 4), 9, 0.3, True),
        ((16, 20), 4, 0.2, False),
        ((5, 9), 3, 0.1, True),
        ((9, 9), 2, 0.5, False),
        ((12, 12), 1, 0.1, True),
    ],
)
def test_dropblock_drops_the_fraction_it_is_told(
    size: tuple[int, int], block: int, p: float, per_channel: bool
) -> None:
    channels = 4 if per_channel else 1
    blocks = max(1.0, size[0] * size[1] / block**2) * p / (1 - p)
    count = math.ceil(27_000 / blocks / channels)  # images for a standard error of 0.6 % of p
    out = functional.dropblock2d(
        torch.ones(count, channels, *size), p, block, key=random.key(0), per_channel=per_channel
    )
    assert (out == 0).float().mean().item() == pytest.approx(p, rel=0.02)


@pytest.mark.parametrize(("size", "block"), [((8, 8), 3), ((5, 9), 4), ((6, 6), 7)])
def test_dropblock_drops_borders_as_often_as_the_middle(size: tuple[int, int], block: int) -> None:
    out = functional.dropblock2d(torch.ones(20_000, 1, *size), 0.2, block, key=random.key(0))
    rates = (out == 0).double().mean((0, 1))
    assert (rates - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 20_000)


def test_pylocron_drops_a_block_squared_too_little() -> None:
    x = torch.ones(400, 1, 28, 28)
    theirs = holocron.nn.DropBlock2d(0.1, 7).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert (theirs(x) == 0).float().mean() < 0.005


def test_names_that_pylocron_has() -> None:
    layer = nn.DropBlock2d(0.1, 7)
    assert (1 - layer.drop_prob) ** 49 == pytest.approx(0.9)
    assert layer.drop_prob == pytest.approx(holocron.nn.DropBlock2d(0.1, 7).drop_prob, rel=0.06)
    assert nn.ConcatDownsample2dJit is nn.ConcatDownsample2d


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_what_dropblock_drops_are_blocks(block: int) -> None:
    kept = functional.dropblock2d(torch.ones(20, 2, 11, 13), 0.3, block, key=random.key(3), per_channel=True) > 0
    dropped = F.pad((~kept).float(), [block] * 4, value=1.0)
    whole = -F.max_pool2d(-dropped, block, 1)  # places whose block is dropped completely
    reached = F.max_pool2d(F.pad(whole, [block - 1] * 4), block, 1)
    close(reached, dropped)


def test_dropblock_keeps_the_sum_and_its_channels_together() -> None:
    x = draw(0, 8, 3, 10, 10).abs() + 1.0
    out = functional.dropblock2d(torch.ones_like(x), 0.3, 3, key=random.key(0))
    close(out.sum(), torch.ones_like(x).sum())
    close(out, out[:, :1].expand_as(out))
    own = functional.dropblock2d(torch.ones_like(x), 0.3, 3, key=random.key(0), per_channel=True)
    assert not torch.equal(own, own[:, :1].expand_as(own))


def test_dropblock_at_the_ends_of_its_range() -> None:
    x = draw(0, 2, 3, 10, 10)
    close(functional.dropblock2d(x, 0.0, 3, key=random.key(0)), x)
    close(functional.dropblock2d(x, 1.0, 3, key=random.key(0)), torch.zeros_like(x))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_rates_may_be_tensors(p: float) -> None:
    x = draw(0, 4, 3, 6, 6)
    for fn in (functional.dropout, functional.drop_path, partial(functional.dropblock2d, block_size=3)):
        close(fn(x, p=torch.tensor(p), key=random.key(1)), fn(x, p=p, key=random.key(1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_and_stochastic_depth(p: float) -> None:
    x = torch.ones(20_000, 4, 5)
    elements, samples = functional.dropout(x, p, key=random.key(0)), functional.drop_path(x, p, key=random.key(0))
    for out in (elements, samples):
        close(out.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    assert (elements == 0).float().mean().item() == pytest.approx(p, rel=0.02)
    assert (samples == 0).float().mean().item() == pytest.approx(p, rel=0.05)
    close(samples, samples[:, :1, :1].expand_as(samples))


# --- refusals ----------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: nn.NLReLU(0.0), "beta must be positive, got 0.0"),
    (lambda: nn.FReLU(4, 2), "kernel_size must be odd and positive, got 2"),
    (lambda: nn.SlimConv2d(6, 3), "in_channels must be divisible by 4, got 6"),
    (lambda: nn.PyConv2d(8, 10, 3, 4), "out_channels must be divisible by 4 for 4 levels, got 10"),
    (lambda: nn.PyConv2d(8, 12, 3, 5), "out_channels must be divisible by 8 for 5 levels, got 12"),
    (lambda: nn.PyConv2d(8, 8, 3, 0), "num_levels must be at least 1, got 0"),
    (lambda: nn.PyConv2d(8, 8, 3, 2, groups=[1]), r"groups must have one entry per level \(2\), got \[1\]"),
    (lambda: nn.Involution2d(8, 3, groups=3), "groups must divide in_channels=8, got 3"),
    (lambda: nn.Involution2d(8, 3, reduction_ratio=9), "reduction_ratio must be at most in_channels=8, got 9"),
    (lambda: functional.involution2d(torch.ones(1, 4, 5, 5), torch.ones(1, 9, 5, 5)), r"kernels must have shape \(N, "),
    (lambda: nn.LambdaLayer(8, 10, 4, r=3), "out_channels must be divisible by num_heads=4, got 10"),
    (lambda: nn.LambdaLayer(8, 8, 4, r=4), "r must be odd and positive, got 4"),
    (lambda: nn.LambdaLayer(8, 8, 4), "the number of pixels n or the side of the window r must be given"),
    (lambda: nn.DropBlock2d(1.1), r"p must be in \[0, 1\], got 1.1"),
    (lambda: nn.DropBlock2d(0.1, 0), "block_size must be at least 1, got 0"),
    (lambda: nn.Dropout(-0.1), r"p must be in \[0, 1\], got -0.1"),
    (lambda: nn.ConcatDownsample2d(0), "scale_factor must be at least 1, got 0"),
    (lambda: nn.ConcatDownsample2d(2)(torch.ones(1, 1, 4, 5)), "scale_factor must divide .* got 2 for 4x5"),
    (lambda: nn.BlurPool2d(3, 1), "kernel_size must be at least 2, got 1"),
    (lambda: nn.BlurPool2d(3, stride=0), "stride must be at least 1, got 0"),
    (lambda: nn.BlurPool2d(3)(torch.ones(1, 4, 5, 5)), r"x must have 3 channels, got shape \(1, 4, 5, 5\)"),
    (lambda: nn.SPP([]), r"kernel_sizes must be odd and positive, got \[\]"),
    (lambda: nn.SPP([3, 4]), r"kernel_sizes must be odd and positive, got \[3, 4\]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
