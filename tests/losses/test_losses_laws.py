"""Every loss through the same laws: derivatives, transforms, compilation, reductions, weights, ignoring, precision."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import draw
from torch import Tensor

from holofunc import jit, losses, random

N, K, H, W = 3, 4, 2, 3
IGNORED = -100


class Case(NamedTuple):
    """`loss(logits, targets, **options)`; the sample dimension of logits (targets have theirs first)."""

    loss: Callable[..., Tensor]
    logits: Tensor
    targets: Tensor
    options: dict[str, Any] = {}  # noqa: RUF012
    dim: int = 0

    def __call__(self, logits: Tensor, **more: Any) -> Tensor:
        return self.loss(logits, self.targets, **self.options, **more)

    @property
    def hard(self) -> bool:
        return not self.targets.is_floating_point()


def labels(*shape: int, low: int = 0, high: int = K) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7))


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
KEY = random.key(3)
POSITIONWISE = {  # one value per position
    "cross_entropy": (losses.cross_entropy, {"label_smoothing": 0.1}),
    "focal": (losses.focal, {"gamma": 2.0}),
    "focal-half": (losses.focal, {"gamma": 0.5, "label_smoothing": 0.1}),
    "poly": (losses.poly, {"eps": 1.5, "label_smoothing": 0.1}),
    "multilabel_cross_entropy": (losses.multilabel_cross_entropy, {}),
    "complement_cross_entropy": (losses.complement_cross_entropy, {"gamma": -1.0}),
    "class_balanced": (losses.class_balanced(losses.focal, [5, 10, 0, 100], beta=0.9), {"label_smoothing": 0.1}),
    "binary_cross_entropy": (losses.binary_cross_entropy, {"pos_weight": WEIGHT.flip(0), "label_smoothing": 0.1}),
    "sigmoid_focal": (losses.sigmoid_focal, {"gamma": 1.5, "label_smoothing": 0.1}),
}
BINARY = (losses.binary_cross_entropy, losses.sigmoid_focal)  # a value per decision
REGIONS = {  # a value per sample: options with labels, and with soft targets
    "dice": (losses.dice, {}, {"squared": False, "gamma": 2.0, "absent": "count"}),
    "tversky": (losses.tversky, {"gamma": 0.75}, {"absent": "count"}),
    "generalized_dice": (losses.generalized_dice, {}, {"activation": "sigmoid"}),
    "lovasz": (losses.lovasz, {}, {"absent": "count"}),
}
OTHERS = {"cosine", "huber", "kl_divergence", "nt_xent", "smooth_l1", "supervised_contrastive", "triplet"}
"""Losses of two inputs of one kind; their table is in test_pair_laws.py."""

SHAPES = {  # logits, hard targets, soft targets
    "vector": (draw(N, K), labels(N), draw(N, K, seed=1).softmax(1)),
    "dense": (draw(N, K, H, W), labels(N, H, W), draw(N, K, H, W, seed=1).softmax(1)),
}
MAPS = draw(N, 3 * K, H, W)


def table() -> dict[str, Case]:
    cases = {}
    for form, (x, hard, soft) in SHAPES.items():
        for name, (loss, options) in POSITIONWISE.items():
            cases[f"{name}/{form}/hard"] = Case(loss, x, hard, options)
            cases[f"{name}/{form}/soft"] = Case(loss, x, soft, options)
        for name, (loss, options, of_soft) in REGIONS.items():
            cases[f"{name}/{form}/hard"] = Case(loss, x, hard, options)
            cases[f"{name}/{form}/soft"] = Case(loss, x, soft, of_soft)
    mutual = {"xi": 3, "alpha": 2.0, "key": KEY}
    cases["mutual_channel/map/hard"] = Case(losses.mutual_channel, MAPS, labels(N), mutual)
    cases["mutual_channel/map/soft"] = Case(losses.mutual_channel, MAPS, SHAPES["vector"][2], mutual)
    cases["mutual_channel/dense/hard"] = Case(losses.mutual_channel, MAPS, labels(N, H, W), mutual)
    cases["mutual_channel/dense/soft"] = Case(losses.mutual_channel, MAPS, SHAPES["dense"][2], mutual)
    cases["mutual_channel/vector/hard"] = Case(losses.mutual_channel, MAPS[..., 0, 0], labels(N), mutual)
    texts = torch.tensor([[1, 1], [2, 3], [3, IGNORED]])
    cases["ctc/frames/hard"] = Case(losses.ctc, draw(5, N, K), texts, {"input_lengths": torch.tensor([5, 4, 5])}, 1)
    return cases


CASES = table()
HARD = {name: case for name, case in CASES.items() if case.hard}
BY_POSITION = {
    name: case
    for name, case in CASES.items()
    if name.split("/")[0] in POSITIONWISE and not name.startswith("class_balanced")
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_hard = pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())
by_position = pytest.mark.parametrize("case", BY_POSITION.values(), ids=BY_POSITION.keys())


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_table_is_complete() -> None:
    named = {name.split("/")[0].split("-")[0] for name in CASES}
    assert named == set(losses.__all__) - {"check_labels"} - OTHERS


# --- derivatives -------------------------------------------------------------------------------------------------


@every
def test_gradcheck(case: Case) -> None:
    x = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(case, (x,), check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@every
def test_jvp_equals_finite_differences(case: Case) -> None:
    x, v, step = case.logits, draw(*case.logits.shape, seed=5), 1e-6
    _, tangent = torch.func.jvp(case, (x,), (v,))
    close(tangent, (case(x + step * v) - case(x - step * v)) / (2 * step), 1e-7)


@every
def test_hessian_vector_products_agree_both_ways(case: Case) -> None:
    x, v, step = case.logits, draw(*case.logits.shape, seed=5), 1e-6
    gradient = torch.func.grad(case)
    forward = torch.func.jvp(gradient, (x,), (v,))[1]
    close(forward, torch.func.grad(lambda x: (gradient(x) * v).sum())(x))
    close(forward, (gradient(x + step * v) - gradient(x - step * v)) / (2 * step), 1e-6)


@every
def test_vmap_of_grad_equals_a_loop(case: Case) -> None:
    lengths = case.options.get("input_lengths")
    options = {name: value for name, value in case.options.items() if name != "input_lengths"}

    def one(x: Tensor, t: Tensor, length: Tensor | None) -> Tensor:
        more = options if length is None else options | {"input_lengths": length[None]}
        return case.loss(x.unsqueeze(case.dim), t[None], **more)

    gradient = torch.func.grad(one)
    xs = case.logits.movedim(case.dim, 0)
    mapped = torch.func.vmap(gradient, in_dims=(0, 0, None if lengths is None else 0))(xs, case.targets, lengths)
    each = [
        gradient(x, t, None if lengths is None else lengths[i])
        for i, (x, t) in enumerate(zip(xs, case.targets, strict=True))
    ]
    close(mapped, torch.stack(each))


UNBATCHED = [name for name in CASES if "/vector/" in name] + ["mutual_channel/map/hard", "ctc/frames/hard"]


@pytest.mark.parametrize("name", UNBATCHED)
def test_one_sample_needs_no_batch_dimension(name: str) -> None:
    case = CASES[name]
    options = {key: value for key, value in case.options.items() if key != "input_lengths"}
    one = functools.partial(case.loss, **options)
    mapped = torch.func.vmap(one, in_dims=(case.dim, 0))(case.logits, case.targets)
    assert mapped.shape == (N,)
    batched = [one(case.logits.narrow(case.dim, i, 1), case.targets[i : i + 1]) for i in range(N)]
    close(mapped, torch.stack(batched))


# --- compilation -------------------------------------------------------------------------------------------------


@every
def test_compiles_into_one_graph_forward_and_backward(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad_and_value(case), fullgraph=True, backend="aot_eager")
    gradient, value = compiled(case.logits)
    close(value, case(case.logits))
    close(gradient, torch.func.grad(case)(case.logits))


@every
def test_exports(case: Case) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case(x)

    exported = torch.export.export(Module(), (case.logits,)).module()
    close(exported(case.logits), case(case.logits))


@every
def test_vmap_of_grad_compiles(case: Case) -> None:
    torch.compiler.reset()
    xs = torch.stack([case.logits, -case.logits])
    mapped = torch.func.vmap(torch.func.grad(case))
    close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(xs), mapped(xs))


def along(case: Case) -> tuple[Tensor, Tensor]:
    """A point and a direction of one layout: torch 2.14 does not compile views of two (docs/gotchas.md)."""
    return case.logits.contiguous(), draw(*case.logits.shape, seed=5)


@every
def test_hessian_vector_products_compile(case: Case) -> None:
    torch.compiler.reset()
    product = lambda x, v: torch.func.jvp(torch.func.grad(case), (x,), (v,))  # noqa: E731
    close(torch.compile(product, fullgraph=True, backend="aot_eager")(*along(case)), product(*along(case)))


@pytest.mark.slow
@every
def test_jvp_compiles(case: Case) -> None:
    torch.compiler.reset()
    product = lambda x, v: torch.func.jvp(case, (x,), (v,))  # noqa: E731
    close(torch.compile(product, fullgraph=True, backend="aot_eager")(*along(case)), product(*along(case)))


INDUCED = {
    "focal-half/dense/hard",
    "complement_cross_entropy/vector/soft",
    "mutual_channel/map/hard",
    "dice/dense/hard",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in INDUCED else pytest.mark.slow) for n in CASES])
def test_inductor_agrees(name: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    x = case.logits.float()
    gradient, value = torch.compile(torch.func.grad_and_value(case), fullgraph=True)(x)
    expected_gradient, expected = torch.func.grad_and_value(case)(x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


# --- layouts, precision, extremes --------------------------------------------------------------------------------


@every
def test_memory_layout_does_not_matter(case: Case) -> None:
    strided = torch.stack([case.logits, case.logits], -1)[..., 0]
    assert not strided.is_contiguous()
    close(case(strided), case(case.logits))
    if case.logits.ndim == 4:
        last = case.logits.to(memory_format=torch.channels_last)
        close(case(last), case(case.logits))
        close(torch.func.grad(case)(last), torch.func.grad(case)(case.logits))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    half = case.logits.to(dtype)
    value, gradient = case(half), torch.func.grad(case)(half)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, case(half.float()))
    assert case(half.float()).dtype == torch.float32
    assert case(half.double()).dtype == torch.float64


@every
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("sign", [1, -1])
def test_confident_logits_are_finite(case: Case, scale: float, sign: int) -> None:
    x = (sign * scale * case.logits).float()
    gradient, value = torch.func.grad_and_value(case)(x)
    assert value.isfinite()
    assert gradient.isfinite().all()
    hvp = torch.func.jvp(torch.func.grad(case), (x,), (torch.ones_like(x),))[1]
    assert hvp.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confident_logits_in_half_precision_are_finite(case: Case, dtype: torch.dtype) -> None:
    for scale in (1e4, -1e4):
        gradient, value = torch.func.grad_and_value(case)((scale * case.logits).to(dtype))
        assert value.isfinite()
        assert gradient.isfinite().all()


@every
def test_equal_logits_are_finite_to_second_order(case: Case) -> None:
    x = torch.zeros_like(case.logits)
    gradient, value = torch.func.grad_and_value(case)(x)
    hvp = torch.func.jvp(torch.func.grad(case), (x,), (case.logits,))[1]
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert hvp.isfinite().all()


@every
def test_shapes_and_dtypes_are_enough(case: Case) -> None:
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.options.items()}
    if "key" in options:
        options["key"] = None
    value = case.loss(case.logits.to("meta"), case.targets.to("meta"), **options)
    assert value.shape == ()


@every
def test_pure(case: Case) -> None:
    x, t, state = case.logits.clone(), case.targets.clone(), torch.random.get_rng_state()
    first, second = case.loss(x, t, **case.options), case.loss(x, t, **case.options)
    assert torch.equal(first, second)
    assert torch.equal(x, case.logits)
    assert torch.equal(t, case.targets)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- reductions and weights --------------------------------------------------------------------------------------


@every
def test_reductions_agree(case: Case) -> None:
    each = case(case.logits, reduction="none")
    close(case(case.logits, reduction="sum"), each.sum())
    if case.loss in (losses.ctc,) or hasattr(case.loss, "__wrapped__"):
        return  # whose means divide by more than a count: tests of their own
    close(case(case.logits, reduction="mean"), each.mean())


@every
def test_none_gives_one_value_per_target(case: Case) -> None:
    each = case(case.logits, reduction="none")
    name = next(name for name, other in CASES.items() if other is case)
    if name.startswith(("ctc", *REGIONS)):
        assert each.shape == (N,)
    elif case.hard or case.loss in BINARY:
        assert each.shape == case.targets.shape
    else:
        assert each.shape == (N, *case.targets.shape[2:])


@every
def test_reduction_is_validated(case: Case) -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', 'parts', got 'avg'"):
        case(case.logits, reduction="avg")


@every
def test_unit_weights_change_nothing(case: Case) -> None:
    ones = torch.ones(K, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        close(case(case.logits, reduction=reduction, weight=ones), case(case.logits, reduction=reduction))


@every
def test_the_mean_does_not_feel_the_scale_of_weights(case: Case) -> None:
    close(case(case.logits, weight=WEIGHT), case(case.logits, weight=3 * WEIGHT))


@every
def test_weights_of_another_shape_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"weight must have shape \({K},\)"):
        case.loss(case.logits, case.targets, **case.options, weight=torch.ones(K + 1))


@by_position
def test_the_weighted_mean_divides_by_the_weights(case: Case) -> None:
    dim = 1
    if case.loss in BINARY:
        shares = torch.ones(case.logits.shape[:1] + case.logits.shape[2:], dtype=torch.float64)[
            :, None
        ] * WEIGHT.reshape(-1, *[1] * (case.logits.ndim - 2))
        shares = shares.mean(1) if case.hard else shares
    elif case.hard:
        shares = WEIGHT[case.targets]
    else:
        shares = (case.targets.movedim(dim, -1) * WEIGHT).sum(-1)
    each = case(case.logits, weight=WEIGHT, reduction="none")
    close(case(case.logits, weight=WEIGHT), each.sum() / shares.sum())
    close(case(case.logits, weight=WEIGHT, mean_over="samples"), each.mean())


@by_position
def test_mean_over_is_validated(case: Case) -> None:
    with pytest.raises(ValueError, match="mean_over must be one of 'weights', 'samples', got 'all'"):
        case(case.logits, mean_over="all")


@every
def test_parts_are_what_the_mean_divides_and_add_up(case: Case) -> None:
    for weight in (None, WEIGHT):
        total, mass = case(case.logits, reduction="parts", weight=weight)
        close(total / mass, case(case.logits, weight=weight))
        options = {name: value for name, value in case.options.items() if name != "input_lengths"}
        each = [
            case.loss(
                case.logits.narrow(case.dim, i, 1), case.targets[i : i + 1], **options, reduction="parts", weight=weight
            )
            for i in range(N)
        ]
        if options == case.options:
            close(torch.stack(each).sum(0), torch.stack([total, mass]))


@every
def test_weights_may_be_numbers(case: Case) -> None:
    close(case(case.logits, weight=WEIGHT.tolist()), case(case.logits, weight=WEIGHT))
    with pytest.raises(
        TypeError, match=rf"weight must be a number, a sequence of numbers or a tensor of shape \({K},\)"
    ):
        case(case.logits, weight="balanced")
    with pytest.raises(ValueError, match=rf"weight must have shape \({K},\), one value per class, got 0.5"):
        case(case.logits, weight=0.5)


@every
def test_weights_of_zero_make_a_mean_of_nothing(case: Case) -> None:
    gradient, value = torch.func.grad_and_value(lambda x: case(x, weight=torch.zeros(K, dtype=x.dtype)))(case.logits)
    assert value == 0
    assert (gradient == 0).all()


# --- targets -----------------------------------------------------------------------------------------------------


def one_hot(targets: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(targets, K).movedim(-1, 1).double()


@pytest.mark.parametrize("name", [name for name in HARD if not name.startswith("ctc")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_labels_equal_one_hot_targets(name: str, reduction: str, weight: Tensor | None) -> None:
    case = HARD[name]
    hard = case(case.logits, reduction=reduction, weight=weight)
    soft = case.loss(case.logits, one_hot(case.targets), **case.options, reduction=reduction, weight=weight)
    if case.loss in BINARY:  # one value per decision; a label's is their mean
        soft = soft.mean(1) if reduction == "none" else soft / K if reduction == "sum" else soft
    close(hard, soft)


@every_hard
@pytest.mark.parametrize("ignored", [IGNORED, 255, -1, 1])
def test_everything_ignored_is_zero_with_zero_gradient(case: Case, ignored: int) -> None:
    targets = torch.full_like(case.targets, ignored)
    for reduction in ("mean", "sum", "none"):
        gradient, value = torch.func.grad_and_value(
            lambda x: case.loss(x, targets, **case.options, reduction=reduction, ignore_index=ignored).sum()  # noqa: B023
        )(case.logits)
        assert value == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", [name for name in BY_POSITION if name.endswith("/hard")])
@pytest.mark.parametrize("ignored", [IGNORED, 255, 2, K])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_ignored_positions_count_nothing(name: str, ignored: int, weight: Tensor | None) -> None:
    case = BY_POSITION[name]
    targets = torch.where(labels(*case.targets.shape, high=2) == 0, ignored, case.targets)
    kept = targets != ignored
    assert 0 < kept.sum() < kept.numel()
    options = case.options | {"weight": weight}
    rows = case.logits.movedim(1, -1)[kept]  # the positions left, as a batch
    for reduction in ("mean", "sum", "none"):
        actual = case.loss(case.logits, targets, **options, reduction=reduction, ignore_index=ignored)
        expected = case.loss(rows, targets[kept], **options, reduction=reduction)
        if reduction == "none":
            assert (actual[~kept] == 0).all()
            actual = actual[kept]
        close(actual, expected)


SOFTMAX = [name for name, case in BY_POSITION.items() if not case.hard and case.loss not in BINARY]


@pytest.mark.parametrize("name", SOFTMAX)
def test_rows_of_zeros_are_ignored_soft_targets(name: str) -> None:
    case = BY_POSITION[name]
    targets = case.targets.clone()
    targets[0] = 0
    close(case.loss(case.logits, targets, **case.options), case.loss(case.logits[1:], targets[1:], **case.options))


@every_hard
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_labels_will_do(case: Case, dtype: torch.dtype) -> None:
    targets = case.targets.clamp_min(1).to(dtype)  # 0 is the blank of ctc
    close(case.loss(case.logits, targets, **case.options), case.loss(case.logits, targets.long(), **case.options))


@every_hard
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_must_be_integers_in_eager_and_compiled_code(case: Case, dtype: torch.dtype) -> None:
    targets = case.targets.to(dtype)
    wrong = functools.partial(case.loss, **{name: value for name, value in case.options.items() if name != "key"})
    with pytest.raises(TypeError, match=f"must have an integer dtype such as torch.int64, got {dtype}"):
        wrong(case.logits, targets)
    with pytest.raises(TypeError, match=f"must have an integer dtype such as torch.int64, got {dtype}"):
        jit(wrong)(case.logits, targets)


@every
def test_targets_of_another_shape_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"got .*\(2,"):
        case.loss(case.logits, case.targets[:2], **case.options)


@every
def test_an_empty_batch_is_refused(case: Case) -> None:
    options = {name: value for name, value in case.options.items() if name != "input_lengths"}
    with pytest.raises(ValueError, match="logits must hold at least one sample and one class, got shape"):
        case.loss(case.logits.narrow(case.dim, 0, 0), case.targets[:0], **options)


@every
def test_integer_logits_are_refused(case: Case) -> None:
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch.int64"):
        case.loss(case.logits.long(), case.targets, **case.options)


@every
def test_adding_to_all_logits_changes_nothing(case: Case) -> None:
    if case.loss in (*BINARY, losses.mutual_channel) or "activation" in case.options:
        shift = 0.0  # sigmoids and masked channels do feel it
    else:
        shift = 3.0
    close(case(case.logits + shift), case(case.logits))


@every
def test_a_batch_of_one(case: Case) -> None:
    options = dict(case.options)
    if "input_lengths" in options:
        options["input_lengths"] = options["input_lengths"][:1]
    value = case.loss(case.logits.narrow(case.dim, 0, 1), case.targets[:1], **options, reduction="none")
    close(value, case(case.logits, reduction="none")[:1])
