"""Curvature against the matrices written out."""

import sys

import pytest
import torch
from torch import nn

import holofunc
from holofunc import analysis, lift, losses, models, random, train, tree
from holofunc.analysis.hessians import flat_signs, flatten


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def small():
    model = lift(build)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(1), (7, 6), dtype=torch.float64)
    return train.supervised(model, losses.cross_entropy), params, buffers, (x, torch.arange(7) % 3)


def dense(kind, objective, params, buffers, batch):
    """The matrix from its definition."""
    sizes = [p.numel() for p in params.values()]

    def named(vector):
        parts = vector.split(sizes)
        return {n: v.view(p.shape) for (n, p), v in zip(params.items(), parts, strict=True)}

    w = flatten(params)
    if kind == "hessian":
        return torch.func.hessian(lambda w: objective(named(w), buffers, batch, None)[0])(w)
    x, y = batch
    outputs = lambda w: objective.model.apply(named(w), buffers, x)[0]  # noqa: E731
    if kind == "fisher":
        rows = torch.func.jacrev(lambda w: losses.cross_entropy(outputs(w), y, reduction="none"))(w)
        return rows.mT @ rows / len(y)
    jacobian = torch.func.jacrev(outputs)(w).flatten(0, 1)
    inner = torch.func.hessian(lambda out: losses.cross_entropy(out, y))(outputs(w)).reshape(21, 21)
    return jacobian.mT @ inner @ jacobian


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_are_those_of_the_matrix(small, kind):
    matrix = dense(kind, *small)
    v = random.normal(random.key(2), (len(matrix),), dtype=torch.float64)
    like = small[1]
    parts = dict(zip(like, v.split([p.numel() for p in like.values()]), strict=True))
    got = analysis.hvp(*small, {n: parts[n].view(p.shape) for n, p in like.items()}, kind=kind)
    torch.testing.assert_close(flatten(got), matrix @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_are_those_of_the_matrix(small, kind, which):
    matrix = dense(kind, *small)
    values, vectors = torch.linalg.eigh(matrix)
    order = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort()[:3]
    got = analysis.hessian_eigenvalues(*small, k=3, key=random.key(3), which=which, kind=kind, iterations=len(matrix))
    torch.testing.assert_close(got.values, values[order], rtol=1e-8, atol=1e-10)
    assert got.converged.all()
    assert (got.residuals < 1e-8).all()
    if values[order][0].abs() > 1e-6:  # of a degenerate value there are many vectors
        found = flatten(tree.map(lambda x: x[0], got.vectors))
        assert (found @ vectors[:, order[0]]).abs() > 1 - 1e-8


def test_eigenvalues_say_when_they_have_not_converged(small):
    got = analysis.hessian_eigenvalues(*small, k=2, key=random.key(3), iterations=3, tol=1e-6)
    assert not got.converged.any()
    exact = torch.linalg.eigvalsh(dense("hessian", *small))
    assert ((got.values[:, None] - exact).abs().min(1).values <= got.residuals + 1e-12).all()


def test_trace_and_diagonal_are_unbiased_estimates(small):
    matrix = dense("hessian", *small)
    apart = (matrix - matrix.diag().diag()).norm()
    probes = 200
    trace = analysis.hessian_trace(*small, key=random.key(4), probes=probes)
    assert abs(trace - matrix.trace()) < 4 * (2 / probes) ** 0.5 * apart
    plus = analysis.hessian_trace(*small, key=random.key(4), probes=90, method="hutch++")
    assert abs(plus - matrix.trace()) < 0.1 * abs(trace - matrix.trace()) + 1e-3 * apart
    diagonal = flatten(analysis.hessian_diagonal(*small, key=random.key(5), probes=probes))
    assert ((diagonal - matrix.diag()).abs() < 5 * apart / probes**0.5).all()


def test_hutch_plus_plus_is_exact_where_the_sketch_holds_everything(small):
    matrix = dense("ggn", *small)  # of rank 14 at most
    got = analysis.hessian_trace(*small, key=random.key(4), probes=60, method="hutch++", kind="ggn")
    torch.testing.assert_close(got, matrix.trace())


def test_density_has_the_moments_of_the_spectrum(small):
    values = torch.linalg.eigvalsh(dense("hessian", *small))
    grid, density = analysis.spectral_density(*small, key=random.key(6), probes=20, iterations=12, width=0.002)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones((), dtype=grid.dtype))
    torch.testing.assert_close(torch.trapezoid(density * grid, grid), values.mean(), rtol=0.2, atol=0.01)
    torch.testing.assert_close(torch.trapezoid(density * grid**2, grid), values.square().mean(), rtol=0.3, atol=1e-3)


def test_density_of_a_flat_loss_is_a_peak_at_zero():
    flat = lambda params, buffers, batch, key: (params["w"].sum(), None)  # noqa: E731
    grid, density = analysis.spectral_density(flat, {"w": torch.ones(3)}, {}, torch.zeros(1), key=random.key(0))
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones(()))
    torch.testing.assert_close(torch.trapezoid(density * grid, grid), torch.zeros(()), atol=1e-6, rtol=0)


def test_spectra_of_half_precision():
    square = lambda params, buffers, batch, key: (params["w"].square().sum() / 2, None)  # noqa: E731
    state = {"w": torch.ones(5, dtype=torch.bfloat16)}, {}, torch.zeros(1)
    found = analysis.hessian_eigenvalues(square, *state, k=2, key=random.key(0))
    torch.testing.assert_close(found.values, torch.ones(2), atol=0.02, rtol=0)
    assert found.vectors["w"].dtype == torch.bfloat16
    for method in ("hutchinson", "hutch++"):
        trace = analysis.hessian_trace(square, *state, key=random.key(0), method=method)
        torch.testing.assert_close(trace, torch.tensor(5.0), atol=0.1, rtol=0)
    assert analysis.spectral_density(square, *state, key=random.key(0)).density.isfinite().all()


def test_signs_are_signs(small):
    (z,) = flat_signs(random.key(0), small[1], 1)
    assert set(z.tolist()) == {-1.0, 1.0}


def test_sharpness_is_the_rise_along_the_gradient(small):
    objective, params, *rest = small
    loss = lambda p: objective(p, *rest, None)[0]  # noqa: E731
    grads = torch.func.grad(loss)(params)
    norm = tree.global_norm(grads)
    moved = tree.map(lambda p, g: p + 0.1 * g / norm, params, grads)
    torch.testing.assert_close(analysis.sharpness(*small, rho=0.1), loss(moved) - loss(params))
    assert analysis.sharpness(*small, rho=0.1, steps=10) >= analysis.sharpness(*small, rho=0.1)
    assert analysis.sharpness(*small, rho=0.1, adaptive=True) > 0


def test_adaptive_sharpness_does_not_see_a_rescaling():
    def objective(params, buffers, batch, key):
        return (params["a"] * params["b"] - 2).square().sum(), None

    one = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    other = {"a": torch.tensor([4.0]), "b": torch.tensor([0.25])}
    same, moved = (analysis.sharpness(objective, p, {}, torch.zeros(1), adaptive=True) for p in (one, other))
    torch.testing.assert_close(same, moved)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_with_batch_statistics(kind):
    model = models.smallnet(widths=(2, 3, 4), num_classes=3)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    batch = random.normal(random.key(1), (5, 3, 6, 6), dtype=torch.float64), torch.arange(5) % 3
    objective = train.supervised(model, losses.cross_entropy)
    v, w = (tree.map(lambda p, k=k: random.normal(random.key(k), p.shape, dtype=p.dtype), params) for k in (2, 3))
    product = analysis.curvature(objective, params, buffers, batch, kind=kind)
    torch.testing.assert_close(flatten(w) @ flatten(product(v)), flatten(v) @ flatten(product(w)))
    if kind == "hessian":
        gradient = torch.func.grad(lambda p: objective(p, buffers, batch, None)[0])
        ahead, behind = (gradient(tree.map(lambda p, d, s=s: p + s * d, params, v)) for s in (1e-6, -1e-6))
        torch.testing.assert_close(flatten(product(v)), (flatten(ahead) - flatten(behind)) / 2e-6, rtol=1e-4, atol=1e-5)


def test_attention_has_curvature():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0].mean(1)

    model = lift(Attend)
    params, buffers = model.init(random.key(0))
    batch = random.normal(random.key(1), (3, 5, 6)), torch.arange(3)
    objective = train.supervised(model, losses.cross_entropy)
    for kind in ("hessian", "ggn", "fisher"):
        product = analysis.hvp(objective, params, buffers, batch, params, kind=kind)
        assert tree.all_finite(product)


@pytest.mark.parametrize("kind", ["hessian", pytest.param("ggn", marks=pytest.mark.slow)])
def test_products_compile(small, kind):
    objective, *state = small

    def product(params, buffers, batch, v):
        return analysis.hvp(objective, params, buffers, batch, v, kind=kind)

    torch.testing.assert_close(holofunc.jit(product)(*state, state[0]), product(*state, state[0]))


def test_linear_operator_finds_eigenvalues_with_scipy(small):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = analysis.as_linear_operator(*small)
    expected = torch.linalg.eigvalsh(dense("hessian", *small))[-2:]
    found = linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(torch.as_tensor(found).sort().values, expected)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_operators_of_curvlinops_take_apply_unchanged(small, kind):
    """Not a dependency: where it is installed, its matrix of `Model.apply` is ours."""
    others = pytest.importorskip("curvlinops")
    objective, params, buffers, batch = small

    class Applied(nn.Module):  # it asks for a module
        def __init__(self):
            super().__init__()
            self.leaves = nn.ParameterList(params.values())

        def forward(self, x):
            return objective.model.apply(dict(zip(params, self.leaves, strict=True)), buffers, x)[0]

    module = Applied()
    operator = {"hessian": others.HessianLinearOperator, "ggn": others.GGNLinearOperator}[kind](
        module, nn.CrossEntropyLoss(), list(module.parameters()), [batch]
    )
    matrix = dense(kind, *small)
    v = random.normal(random.key(2), (len(matrix),), dtype=torch.float64)
    torch.testing.assert_close(operator @ v, matrix @ v, rtol=1e-8, atol=1e-10)


def test_linear_operator_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="as_linear_operator needs SciPy: pip install scipy"):
        analysis.as_linear_operator(*small)


def test_what_cannot_be_asked_is_told(small):
    _, params, buffers, batch = small
    with pytest.raises(ValueError, match="kind must be one of 'hessian', 'ggn', 'fisher', got 'kfac'"):
        analysis.hvp(*small, params, kind="kfac")
    with pytest.raises(ValueError, match="kind='ggn' needs the outputs and the loss apart"):
        analysis.hvp(lambda *_: None, params, buffers, batch, params, kind="ggn")
    with pytest.raises(
        ValueError, match=r"v must have the names, shapes and dtypes of params, which it has not at \['1.bias'\]"
    ):
        analysis.hvp(*small, {n: v for n, v in params.items() if n != "1.bias"})
    with pytest.raises(ValueError, match=r"v must have the names, shapes and dtypes of params.* at \['1.bias'\]"):
        analysis.hvp(*small, {**params, "1.bias": params["1.bias"].half()})
    with pytest.raises(ValueError, match=r"k must be in \[1, 43\], the number of parameters, got 0"):
        analysis.hessian_eigenvalues(*small, k=0, key=random.key(0))
    with pytest.raises(ValueError, match="iterations must be at least k=3, got 2"):
        analysis.hessian_eigenvalues(*small, k=3, key=random.key(0), iterations=2)
    with pytest.raises(ValueError, match="which must be 'largest'"):
        analysis.hessian_eigenvalues(*small, k=3, key=random.key(0), which="LM")
    with pytest.raises(ValueError, match=r"probes must be at least 3 for hutch\+\+, got 2"):
        analysis.hessian_trace(*small, key=random.key(0), probes=2, method="hutch++")
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        analysis.hessian_diagonal(*small, key=random.key(0), probes=0)
    with pytest.raises(ValueError, match="rho must be positive, got 0"):
        analysis.sharpness(*small, rho=0)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x / 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return Halved.apply(self.linear(x))

    model = lift(Cell)
    state = model.init(random.key(0))
    single = batch[0].float(), batch[1]
    with pytest.raises(ValueError, match="a layer has no forward derivative, which curvature needs"):
        analysis.hvp(train.supervised(model, losses.cross_entropy), *state, single, state[0])
