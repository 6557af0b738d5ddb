"""Every layer through the same laws, in train and eval mode; joining the table is the price of entry."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from holofunc import lift, nn, random
from holofunc.model import Drop, Model

# torch compiles its decompositions for forward-mode differentiation with torch.jit, which it deprecates

CHANNELS, SIZE = 8, 6
TABLE: dict[str, Callable[[], torch.nn.Module]] = {
    "HardMish": nn.HardMish,
    "NLReLU": partial(nn.NLReLU, 2.0),
    "FReLU": partial(nn.FReLU, CHANNELS),
    "SAM": partial(nn.SAM, CHANNELS),
    "TripletAttention": nn.TripletAttention,
    "NormConv2d": partial(nn.NormConv2d, CHANNELS, 4, 3, padding=1),
    "NormConv2d-groups": partial(
        nn.NormConv2d, CHANNELS, 4, (3, 2), 2, 1, groups=2, bias=False, padding_mode="reflect"
    ),
    "Add2d": partial(nn.Add2d, CHANNELS, 4, 3, padding=1),
    "Add2d-groups": partial(nn.Add2d, CHANNELS, 4, 3, 2, "valid", 2, groups=2, bias=False),
    "Add2d-normalized": partial(nn.Add2d, CHANNELS, 4, 3, padding=1, groups=2, normalize_slices=True),
    "SlimConv2d": partial(nn.SlimConv2d, CHANNELS, 3, padding=1),
    "PyConv2d": partial(nn.PyConv2d, CHANNELS, 8, 3, 3, padding=1),
    "Involution2d": partial(nn.Involution2d, CHANNELS, 3, 1, groups=2, reduction_ratio=2),
    "Involution2d-stride": partial(nn.Involution2d, CHANNELS, 3, stride=2, groups=4),
    "LambdaLayer-r": partial(nn.LambdaLayer, CHANNELS, 8, 4, r=3, num_heads=2, dim_u=2),
    "LambdaLayer-n": partial(nn.LambdaLayer, CHANNELS, 8, 4, n=SIZE * SIZE),
    "DropBlock2d": partial(nn.DropBlock2d, 0.3, 3),
    "DropBlock2d-channels": partial(nn.DropBlock2d, 0.3, 2, per_channel=True),
    "Dropout": partial(nn.Dropout, 0.4),
    "DropPath": partial(nn.DropPath, 0.4),
    "ConcatDownsample2d": partial(nn.ConcatDownsample2d, 2),
    "GlobalAvgPool2d": nn.GlobalAvgPool2d,
    "GlobalMaxPool2d": partial(nn.GlobalMaxPool2d, flatten=True),
    "BlurPool2d": partial(nn.BlurPool2d, CHANNELS),
    "BlurPool2d-even": partial(nn.BlurPool2d, CHANNELS, 4, 1),
    "SPP": partial(nn.SPP, [5, 3]),
    "ZPool": nn.ZPool,
}


class Layer(NamedTuple):
    """A layer with generic parameters and statistics, and an input."""

    model: Model
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    x: Tensor
    train: bool
    key: Tensor

    @property
    def draws(self) -> bool:
        return self.train and any(isinstance(m, Drop) and m.p > 0 for m in self.model.skeleton.modules())

    @property
    def mixes(self) -> bool:
        """Whether an output depends on the other samples of the batch."""
        norms = any(isinstance(m, torch.nn.BatchNorm2d) for m in self.model.skeleton.modules())
        return self.train and (norms or isinstance(self.model.skeleton, nn.DropBlock2d))

    def __call__(self, params: dict[str, Tensor], x: Tensor, key: Tensor | None = None) -> Tensor:
        key = self.key if key is None else key
        return self.model.apply(params, self.buffers, x, train=self.train, key=key)[0]

    def objective(self, params: dict[str, Tensor], x: Tensor, key: Tensor | None = None) -> Tensor:
        return scalar(self(params, x, key))


def scalar(y: Tensor) -> Tensor:
    """A curved function that weights all elements differently, those of one sample as those of any other."""
    weights = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).cos().view(y.shape[1:])
    return (torch.sin(y) * weights).sum()


def setup(name: str, train: bool = False, dtype: torch.dtype = torch.float64) -> Layer:
    model = lift(TABLE[name])
    params, buffers = model.init(random.key(0), dtype=dtype)
    draw = partial(random.normal, dtype=dtype)
    keys = random.split(random.key(1), len(params) + len(buffers) + 1)
    params = {n: p + 0.3 * draw(k, p.shape) for (n, p), k in zip(params.items(), keys[1:], strict=False)}
    buffers = {
        n: b if b.dtype == torch.int64 else b + random.uniform(k, b.shape, dtype=dtype)
        for (n, b), k in zip(buffers.items(), keys[1 + len(params) :], strict=True)
    }
    x = draw(keys[0], (3, CHANNELS, SIZE, SIZE))
    return Layer(model, params, buffers, x, train, random.key(2))


@pytest.fixture(
    params=[pytest.param((n, t), id=f"{n}-{'train' if t else 'eval'}") for n in TABLE for t in (False, True)]
)
def layer(request: pytest.FixtureRequest) -> Layer:
    return setup(*request.param)


def close(a: Any, b: Any, **tolerances: float) -> None:
    torch.testing.assert_close(a, b, **tolerances)


def direction(layer: Layer) -> tuple[dict[str, Tensor], Tensor]:
    keys = random.split(random.key(5), len(layer.params) + 1)
    params = {
        n: random.normal(k, p.shape, dtype=p.dtype) for (n, p), k in zip(layer.params.items(), keys, strict=False)
    }
    return params, random.normal(keys[-1], layer.x.shape, dtype=layer.x.dtype)


def moved(layer: Layer, step: float) -> tuple[dict[str, Tensor], Tensor]:
    params, x = direction(layer)
    return {n: p + step * params[n] for n, p in layer.params.items()}, layer.x + step * x


gradient = partial(torch.func.grad, argnums=(0, 1))


def test_the_table_holds_every_layer() -> None:
    classes = [value for value in map(partial(getattr, nn), nn.__all__) if inspect.isclass(value)]
    modules = {value.__name__ for value in classes if issubclass(value, torch.nn.Module)}
    assert modules == {name.split("-")[0] for name in TABLE}


@pytest.mark.parametrize("samples", [1, 2])
def test_gradcheck(layer: Layer, samples: int) -> None:
    if layer.train and samples == 1 and isinstance(layer.model.skeleton, nn.SlimConv2d):
        with pytest.raises(ValueError, match="train=True needs at least 2 images, got 1"):
            layer(layer.params, layer.x[:1])
        return
    names = list(layer.params)
    inputs = [t.clone().requires_grad_() for t in (layer.x[:samples], *layer.params.values())]
    fn = lambda x, *values: layer(dict(zip(names, values, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)


def test_jvp_is_the_finite_difference(layer: Layer) -> None:
    _, derivative = torch.func.jvp(layer, (layer.params, layer.x), direction(layer))
    step = 1e-6
    close(derivative, (layer(*moved(layer, step)) - layer(*moved(layer, -step))) / (2 * step), rtol=1e-5, atol=1e-6)


def test_hessian_vector_products_agree_and_are_the_finite_difference(layer: Layer) -> None:
    grad = gradient(layer.objective)
    point, v = (layer.params, layer.x), direction(layer)
    _, forward = torch.func.jvp(grad, point, v)
    _, pull = torch.func.vjp(grad, *point)
    close(pull(v), forward, rtol=1e-8, atol=1e-9)
    step = 1e-6
    above, below = grad(*moved(layer, step)), grad(*moved(layer, -step))
    difference = torch.utils._pytree.tree_map(lambda a, b: (a - b) / (2 * step), above, below)
    close(forward, difference, rtol=1e-4, atol=1e-5)


def test_vmapped_gradients_are_those_of_a_loop(layer: Layer) -> None:
    keys = random.split(random.key(7), len(layer.x))

    def one(params: dict[str, Tensor], x: Tensor, key: Tensor) -> Tensor:
        return layer.objective(params, x[None], key)

    mapped = torch.func.vmap(gradient(one), in_dims=(None, 0, 0))
    if layer.mixes and not layer.draws:  # batch statistics: no gradient of one sample exists
        with pytest.raises(ValueError, match=r"use train=False .* or a model with GroupNorm|needs at least 2 images"):
            mapped(layer.params, layer.x, keys)
        return
    per_sample = mapped(layer.params, layer.x, keys)
    for i in range(len(layer.x)):
        if layer.draws:
            expected = gradient(one)(layer.params, layer.x[i], keys[i])
        else:  # the rows of a batch: batch norm's backward for one sample is not to be trusted as a reference
            grads, rows = gradient(lambda p, x, i=i: scalar(layer(p, x)[i : i + 1]))(layer.params, layer.x)
            expected = grads, rows[i]
        close(torch.utils._pytree.tree_map(lambda g, i=i: g[i], per_sample), expected, rtol=1e-9, atol=1e-10)


def test_batch_of_one_is_a_row_of_a_batch(layer: Layer) -> None:
    if layer.mixes or layer.draws:
        pytest.skip("depends on the batch")
    close(layer(layer.params, layer.x[:1]), layer(layer.params, layer.x)[:1], rtol=1e-10, atol=1e-12)
    value = gradient(layer.objective)(layer.params, layer.x[:1])
    grads, rows = gradient(lambda p, x: scalar(layer(p, x)[:1]))(layer.params, layer.x)
    close(value, (grads, rows[:1]), rtol=1e-9, atol=1e-10)


def test_compiles_whole_forward_and_backward(layer: Layer) -> None:
    torch._dynamo.reset()
    fn = lambda p, x, k: (layer(p, x, k), gradient(layer.objective)(p, x, k))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=False)
    arguments = layer.params, layer.x, layer.key
    close(compiled(*arguments), fn(*arguments), rtol=1e-9, atol=1e-10)


def products(layer: Layer) -> Callable[..., Any]:
    """Derivatives along a direction, of the layer and of the gradient."""

    def both(params: dict[str, Tensor], x: Tensor, v: tuple[dict[str, Tensor], Tensor]) -> Any:
        point = params, x
        return torch.func.jvp(layer, point, v)[1], torch.func.jvp(gradient(layer.objective), point, v)[1]

    return both


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eval", "train"])
@pytest.mark.parametrize("name", TABLE)
def test_jvp_and_hessian_vector_products_compile(name: str, train: bool) -> None:
    torch._dynamo.reset()
    layer = setup(name, train)
    fn, arguments = products(layer), (layer.params, layer.x, direction(layer))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=False)
    close(compiled(*arguments), fn(*arguments), rtol=1e-8, atol=1e-9)


QUICK = {"Add2d-normalized", "DropBlock2d", "Involution2d-stride"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in TABLE])
def test_compiles_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    layer = setup(name, train=True, dtype=torch.float32)
    fn = lambda p, x, k: (layer(p, x, k), gradient(layer.objective)(p, x, k))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=False)
    arguments = layer.params, layer.x, layer.key
    for actual, expected in zip(
        *map(torch.utils._pytree.tree_leaves, (compiled(*arguments), fn(*arguments))), strict=True
    ):
        size = expected.abs().max().clamp_min(1.0).item()  # sums of large terms that cancel keep their rounding
        close(actual, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("name", TABLE)
def test_exports(name: str) -> None:
    layer = setup(name)
    module = layer.model.to_module(layer.params, layer.buffers)
    program = torch.export.export(module, (layer.x,))
    close(program.module()(layer.x), layer(layer.params, layer.x), rtol=1e-10, atol=1e-12)


def test_bfloat16_is_finite_and_near(layer: Layer) -> None:
    single = {n: p.float() for n, p in layer.params.items()}
    half = {n: p.bfloat16() for n, p in layer.params.items()}
    low = layer._replace(buffers={n: b.bfloat16() if b.is_floating_point() else b for n, b in layer.buffers.items()})
    out = low(half, layer.x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = layer(layer.params, layer.x)
    assert (out.double() - exact).abs().max() < 0.06 * exact.abs().max().clamp_min(1.0)
    grads = gradient(low.objective)(half, layer.x.bfloat16())
    assert all(g.isfinite().all() for g in torch.utils._pytree.tree_leaves(grads))
    assert {n: g.dtype for n, g in grads[0].items()} == dict.fromkeys(single, torch.bfloat16)


@pytest.mark.parametrize("strides", ["channels_last", "every_second", "transposed"])
def test_strides_do_not_matter(layer: Layer, strides: str) -> None:
    x = layer.x
    if strides == "channels_last":
        strided = x.contiguous(memory_format=torch.channels_last)
    elif strides == "every_second":
        strided = torch.stack([x, x], -1).flatten(3)[..., ::2]
    else:
        strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    close(strided, x, rtol=0, atol=0)
    close(layer(layer.params, strided), layer(layer.params, x), rtol=1e-10, atol=1e-12)
    close(
        gradient(layer.objective)(layer.params, strided),
        gradient(layer.objective)(layer.params, x),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (5, 8), (9, 5)])
def test_any_size_with_and_without_a_remainder(layer: Layer, size: tuple[int, int]) -> None:
    x = random.normal(random.key(9), (2, CHANNELS, *size), dtype=torch.float64)
    refused = {"ConcatDownsample2d": any(n % 2 for n in size), "LambdaLayer": size[0] * size[1] != SIZE**2}
    name = type(layer.model.skeleton).__name__
    if refused.get(name) and getattr(layer.model.skeleton, "r", None) is None:
        with pytest.raises(ValueError, match=r"scale_factor must divide|x must have n=36 pixels"):
            layer(layer.params, x)
        return
    out = layer(layer.params, x)
    assert out.isfinite().all()
    reference = layer.model.skeleton.train(layer.train)
    with torch.device("meta"):
        shape = reference(torch.empty(x.shape)).shape
    layer.model.skeleton.eval()
    assert out.shape == shape


@pytest.mark.parametrize("name", TABLE)
def test_builds_without_storage(name: str) -> None:
    with torch.device("meta"):
        module = TABLE[name]()
    real = TABLE[name]()
    shapes = {n: t.shape for n, t in module.state_dict().items()}
    assert shapes == {n: t.shape for n, t in real.state_dict().items()}
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    skeleton = lift(TABLE[name]).skeleton
    assert all(t.is_meta for t in [*skeleton.parameters(), *skeleton.buffers()])


def test_pure(layer: Layer) -> None:
    before = torch.get_rng_state()
    copies = torch.utils._pytree.tree_map(torch.clone, (layer.params, layer.buffers, layer.x))
    first, second = layer(layer.params, layer.x), layer(layer.params, layer.x)
    close(first, second, rtol=0, atol=0)
    close((layer.params, layer.buffers, layer.x), copies, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_matter_in_train_mode_only() -> None:
    for name in ("Dropout", "DropPath", "DropBlock2d", "DropBlock2d-channels"):
        layer = setup(name, train=True)
        x = torch.ones(64, CHANNELS, SIZE, SIZE)
        assert not torch.equal(layer(layer.params, x, random.key(0)), layer(layer.params, x, random.key(1)))
        assert layer._replace(train=False)(layer.params, x) is x
        with pytest.raises(ValueError, match="key must be given, got None"):
            layer.model.apply(layer.params, layer.buffers, x, train=True)
