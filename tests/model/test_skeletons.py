"""What people bring to `lift` and `from_module`: shared parts, parts in use, buffers and attributes of all kinds."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_trees_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from holofunc import from_module, jit, lift, models, optim, random, tree


class Tied(nn.Module):
    def __init__(self, read=False):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        if read:
            float(self.first.weight.sum())  # so that it is not built on the meta device

    def forward(self, x):
        return self.second(self.first(x))


def tied(params, x):
    return F.linear(
        F.linear(x, params["first.weight"], params["first.bias"]), params["first.weight"], params["second.bias"]
    )


X = random.normal(random.key(7), (2, 3))


# --- shared tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True])
def test_tied_weights_are_one_tensor_with_one_gradient(read):
    model = lift(Tied, read=read)
    params, buffers = model.init(random.key(0))
    assert list(params) == ["first.weight", "first.bias", "second.bias"]
    grads = torch.func.grad(lambda p: model.apply(p, buffers, X)[0].square().sum())(params)
    expected = torch.func.grad(lambda p: tied(p, X).square().sum())(params)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_both_names_of_a_tied_weight_are_accepted():
    model = lift(Tied)
    params, buffers = model.init(random.key(0))
    expected = tied(params, X)
    both = {**params, "second.weight": params["first.weight"]}
    other = {"second.weight" if n == "first.weight" else n: p for n, p in params.items()}
    for given in (params, both, other):
        torch.testing.assert_close(model.apply(given, buffers, X)[0], expected)
        assert list(models.surgery.load(model, given)[0]) == list(params)


def test_two_values_of_a_tied_weight_have_no_module():
    model = lift(Tied)
    params, buffers = model.init(random.key(0))
    both = {**params, "second.weight": params["first.weight"] + 1}
    for call in (lambda: model.to_module(both, buffers), lambda: models.surgery.load(model, both)):
        with pytest.raises(ValueError, match=r"second.weight and first.weight are one tensor of Tied, got two"):
            call()


def test_modules_of_tied_weights_are_tied_again():
    module = Tied()
    model, params, buffers = from_module(module)
    torch.testing.assert_close(model.apply(params, buffers, X)[0], module(X).detach())
    again = model.to_module(params, buffers)
    assert again.second.weight is again.first.weight
    torch.testing.assert_close(again(X), module(X))


# --- parts that were there before --------------------------------------------------------------------------------


def test_parts_built_before_lift_keep_their_weights_and_their_place():
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {n: x.clone() for n, x in backbone.state_dict().items()}
    model = lift(lambda: nn.Sequential(backbone, nn.Linear(4, 2)))
    params, buffers = model.init(random.key(0))
    assert all(torch.equal(params[f"0.{n}"], before[n]) for n, _ in backbone.named_parameters())
    model.apply(params, buffers, X, train=True)
    assert backbone.training
    with torch.no_grad():
        params["0.0.weight"].add_(1.0)  # the caller's own is another one
        backbone[0].bias.add_(1.0)
    again, _ = model.init(random.key(1))
    assert all(torch.equal(again[f"0.{n}"], before[n]) for n, _ in backbone.named_parameters())
    assert not torch.equal(again["1.weight"], params["1.weight"])


def test_a_whole_module_built_before_lift():
    net = nn.Linear(3, 2)
    params, _ = lift(lambda: net).init(random.key(0))
    assert torch.equal(params["weight"], net.weight)
    assert params["weight"] is not net.weight


def test_frozen_parameters_are_a_mask():
    backbone = nn.Linear(3, 4).requires_grad_(False)
    model = lift(lambda: nn.Sequential(backbone, nn.Linear(4, 2)))
    assert model.frozen == {"0.weight": True, "0.bias": True, "1.weight": False, "1.bias": False}
    params, _ = model.init(random.key(0))
    tx = optim.chain(optim.sgd(0.1), optim.freeze(model.frozen))
    updates, _ = tx.update({n: torch.ones_like(p) for n, p in params.items()}, tx.init(params), params)
    assert [n for n, u in updates.items() if u.any()] == ["1.weight", "1.bias"]
    assert not model.to_module(params, {})[0].weight.requires_grad


def test_a_constructor_that_reads_values_is_run_once_for_real():
    calls = []

    def build():
        module = nn.Linear(3, 2)
        calls.append(float(module.weight.sum()))  # fails on the meta device
        return module

    lift(build)
    assert len(calls) == 1


def test_a_constructor_that_leaves_torch_is_run_for_real():
    model = lift(lambda: nn.Linear(3, int(torch.arange(3).numpy().sum())))
    assert model.init(random.key(0))[0]["weight"].shape == (3, 3)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        lift(nn.Dropout, 2.0)


def test_a_constructor_that_reads_tables_has_no_layer_for_real_until_init():
    real = []

    class Layer(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            real.append(not self.weight.is_meta)

    def build():  # as torchvision's RegNets and Swin transformers do
        widths = (torch.arange(2) * 4 + 4).tolist()
        return nn.Sequential(Layer(3, widths[0]), Layer(*widths), nn.Dropout(torch.linspace(0, 0.1, 2)[1].item()))

    model = lift(build)
    assert real == [False, False]
    assert [p.shape for p in model.init(random.key(0))[0].values()] == [(4, 3), (4,), (8, 4), (8,)]
    assert real == [False, False, True, True]


# --- purity ------------------------------------------------------------------------------------------------------


class Running(nn.Module):
    """Renews a buffer by assignment, counts in one that is not persistent, and in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen.add_(1.0)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return x * self.seen * self.calls


def test_assigned_buffers_come_back_and_everything_else_is_forgotten():
    model = lift(Running)
    params, buffers = model.init(random.key(0))
    for _ in range(2):
        out, same = model.apply(params, buffers, X)
        assert same is buffers
        assert torch.equal(out, X)
        _, renewed = model.apply(params, buffers, X, train=True)
        torch.testing.assert_close(renewed, {"mean": 0.1 * X.mean()})


def test_assigned_buffers_come_back_from_graphs():
    class Mean(Running):
        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return x

    model = lift(Mean)
    _, buffers = model.init(random.key(0))
    renewed = jit(lambda b, x: model.apply({}, b, x, train=True)[1])(buffers, X)
    torch.testing.assert_close(renewed, {"mean": 0.1 * X.mean()})


class Collects(nn.Module):
    """Puts something into a list, into a dict and among the hooks of a part, as transformers does to show layers."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.named = nn.Linear(3, 3), [], ({},)

    def forward(self, x):
        if not hasattr(self, "hooked"):
            self.layer.register_forward_hook(lambda part, inputs, out: self.seen.append(out))
            self.hooked = True
        out = self.named[0][len(self.named[0])] = self.layer(x)
        return out * len(self.seen) * len(self.named[0])


def test_what_a_forward_collects_is_forgotten():
    model = lift(Collects)
    params, buffers = model.init(random.key(0))
    expected = F.linear(X, params["layer.weight"], params["layer.bias"])
    for train in (False, True, False, True):
        torch.testing.assert_close(model.apply(params, buffers, X, train=train)[0], expected)


def test_looking_for_the_shape_of_an_output_leaves_nothing_behind():
    model, state = lift(Collects), torch.get_rng_state()
    params, buffers = model.init(random.key(0))
    assert model.output_shape(X) == model.output_shape(X[:1].expand(2, 3)) == (2, 3)
    module = model.to_module(params, buffers)
    assert (module.seen, module.named) == ([], ({},))
    assert torch.equal(torch.get_rng_state(), state)


class Late(nn.Module):
    """Registers nothing until it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(0)
        return x - self.mean


def test_what_a_forward_makes_late_is_forgotten():
    model = lift(Late)
    assert model.init(random.key(0)) == ({}, {})
    torch.testing.assert_close(model.apply({}, {}, X)[0], X - X.mean(0))
    torch.testing.assert_close(model.apply({}, {}, X + 1, train=True), (X - X.mean(0), {}))


class Writes(nn.Module):
    """Writes into what it is given, in one of many ways."""

    def __init__(self, write):
        super().__init__()
        self.write, self.weight = write, nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x, **options):
        self.write(self, x, **options)
        return x * self.weight + self.count


WRITES = {
    "relu_": lambda m, x: x.relu_(),
    "F.relu": lambda m, x: F.relu(x, inplace=True),
    "F.elu by position": lambda m, x: F.elu(x, 1.0, True),
    "dropout": lambda m, x: F.dropout(x, 0.5, True, True),
    "view": lambda m, x: x.view(-1)[:2].zero_(),
    "item": lambda m, x: x.__setitem__(0, 5.0),
    "+=": lambda m, x: x.__iadd__(1.0),
    "out": lambda m, x: torch.add(x, 1.0, out=x),
    "data": lambda m, x: m.weight.data.clamp_(max=1.0),
    "data of an input": lambda m, x: x.data.mul_(2.0),
    "parameter": lambda m, x: m.weight.detach().mul_(0.5),
    "buffer": lambda m, x: m.count.add_(1.0),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_nothing_of_the_callers_is_written_into(name, train):
    model = lift(Writes, WRITES[name])
    params, buffers = model.init(random.key(0))
    x = X.clone()
    given = (x, *params.values(), *buffers.values())
    before = [t.clone() for t in given]
    outs = [model.apply(params, buffers, x, train=train, key=random.key(0)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1]["count"], torch.full((3,), float(name == "buffer")))
    with torch.no_grad():
        module = model.to_module(params, buffers).train(train)
        if name != "dropout":
            torch.testing.assert_close(outs[0][0], module(X.clone()))


def test_embeddings_of_bounded_norm_do_not_shorten_the_callers():
    model = lift(nn.Embedding, 5, 3, max_norm=1.0)
    params = {"weight": 100 * torch.ones(5, 3)}
    out, _ = model.apply(params, {}, torch.tensor([0, 1]))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    assert bool((params["weight"] == 100).all())


def test_nested_inputs_and_keyword_arguments_are_guarded_too():
    model = lift(Writes, lambda m, x, other: other["a"][0].zero_())
    params, buffers = model.init(random.key(0))
    other = {"a": [torch.ones(2)]}
    model.apply(params, buffers, X, other=other)
    assert bool(other["a"][0].all())


# --- attributes --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Tensors as attributes, alone and in a list."""

    def __init__(self):
        super().__init__()
        self.grid, self.scales = torch.arange(3.0), [torch.tensor(2.0), torch.tensor(3.0)]

    def forward(self, x):
        return x * self.grid + sum(self.scales)


def test_tensors_in_plain_attributes_are_constants():
    model = lift(Plain)
    params, buffers = model.init(random.key(0))
    assert (params, buffers) == ({}, {})
    torch.testing.assert_close(model.apply({}, {}, X)[0], X * torch.arange(3.0) + 5)
    torch.testing.assert_close(model.to_module({}, {})(X), X * torch.arange(3.0) + 5)


class Keyed(nn.Module):
    """Uses names that mean something elsewhere."""

    def __init__(self):
        super().__init__()
        self.register_buffer("key", torch.full((3,), 2.0), persistent=False)

    def check_input(self, a, b):
        raise AssertionError("it is the module's own")

    def merge(self):
        raise AssertionError("it is the module's own")

    def forward(self, x, *, scale=1.0):
        return x * self.key * scale


def test_names_of_ours_may_be_a_modules_own():
    model = lift(Keyed)
    torch.testing.assert_close(model.apply({}, {}, X, train=True)[0], 2 * X)
    torch.testing.assert_close(model.apply({}, {}, X, scale=3.0)[0], 6 * X)
    assert models.reparametrize(model, {}, {})[0] is model


class Held:
    """Something of a user's own."""

    def __init__(self):
        self.scale = torch.full((3,), 2.0)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = {"a": [Held()]}

    def forward(self, x):
        return x * self.held["a"][0].scale


def test_tensors_in_objects_are_constants():
    assert torch.equal(lift(Holds).apply({}, {}, X)[0], 2 * X)


class Teaches(nn.Module):
    """Compares with a part that is not trained, and hidden so that it is in no state dict."""

    def __init__(self, teacher=None):
        super().__init__()
        self.teacher = [nn.Linear(3, 3) if teacher is None else teacher]

    def forward(self, x):
        return x - self.teacher[0](x)


def test_a_hidden_part_is_a_constant_if_it_was_there_before():
    teacher = nn.Linear(3, 3)
    for model in (lift(lambda: Teaches(teacher)), from_module(Teaches(teacher))[0]):
        assert model.init(random.key(0)) == ({}, {})
        torch.testing.assert_close(model.apply({}, {}, X)[0], X - teacher(X))


def hooked():
    layer = nn.Linear(3, 3)
    layer.weight.register_hook(lambda gradient: 0 * gradient)
    return layer


class Hides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.list = [self.layer.weight]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lift(nn.Sequential, nn.LazyLinear(3)), ValueError, "0 is a lazy layer, whose weight has no shape yet"),
        (lambda: lift(lambda: nn.Sequential(Hides())), ValueError, "0.list hides 0.layer.weight in a list"),
        (lambda: lift(lambda: nn.Sequential(Teaches())), ValueError, "0.teacher hides a Linear that is no part .* use nn.ModuleList"),
        (lambda: from_module(nn.DataParallel(nn.Linear(3, 2))), TypeError, "the module is DataParallel, .* lift its .module"),
        (lambda: lift(lambda: 3), TypeError, "build must return a torch.nn.Module, got int"),
        (lambda: lift(lambda: nn.Sequential(hooked())), ValueError, "^0.weight has a hook on its gradient, .*optim.freeze"),
        (lambda: from_module(nn.Sequential(hooked())), ValueError, "^0.weight has a hook on its gradient, .*optim.freeze"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_lifted_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- layers ------------------------------------------------------------------------------------------------------


def test_cumulative_averages_are_torchs():
    norm = nn.BatchNorm1d(3, momentum=None)
    model, params, buffers = from_module(norm)
    norm.train()
    for seed in range(3):
        x = random.normal(random.key(seed), (8, 3))
        out, buffers = model.apply(params, buffers, x, train=True)
        torch.testing.assert_close(out, norm(x).detach())
        torch.testing.assert_close(buffers, dict(norm.named_buffers()))
    assert list(model.to_module(params, buffers).state_dict()) == list(norm.state_dict())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).flatten(2).transpose(1, 2).sin()


@pytest.mark.parametrize("train", [False, True])
def test_gradients_of_one_image_normalized_are_those_of_two_that_are_alike(train):
    """Torch's own are not: the tokens of a map have their gradient transposed."""
    model = lift(Tokens)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    image = random.normal(random.key(1), (1, 3, 5, 5), dtype=torch.float64)

    def gradient(params, images):
        return torch.func.grad(lambda p: model.apply(p, buffers, images, train=train)[0].square().mean())(params)

    got = gradient(params, image)
    torch.testing.assert_close(got, gradient(params, torch.cat([image, image])))
    if not train:
        torch.testing.assert_close(
            torch.vmap(gradient, (None, 0))(params, image[:, None]), {n: g[None] for n, g in got.items()}
        )
    torch.testing.assert_close(
        model.apply({n: p.requires_grad_() for n, p in params.items()}, buffers, image, train=train),
        model.apply({n: p.detach() for n, p in params.items()}, buffers, image, train=train),
    )


def test_checkpointed_activations_have_derivatives():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    model = lift(Net)
    params, buffers = model.init(random.key(0))
    assert model.apply(params, buffers, X)[0].shape == (2, 2)
    grads = torch.func.grad(lambda p: model.apply(p, buffers, X)[0].sum())(params)
    torch.testing.assert_close(grads["layer.weight"], X.sum(0).expand(2, 3))


class Reads(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


WRONG = {
    "reads": (Reads, ValueError, "Sequential, in 1, reads values of tensors, which under vmap are many: "),
    "batch": (
        *(lambda: nn.BatchNorm2d(3), ValueError),
        "Sequential, in 1, normalizes over the batch, and one sample under vmap has none: ",
    ),
    "shape": (lambda: nn.Linear(5, 3), RuntimeError, "cannot be multiplied"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_part(name):
    build, error, message = WRONG[name]
    model = lift(lambda: nn.Sequential(nn.Identity(), build()))
    params, buffers = model.init(random.key(0))
    with pytest.raises(error, match=message) as raised:
        torch.vmap(lambda x: model.apply(params, buffers, x, train=True)[0])(torch.ones(2, 1, 3, 4, 3))
    assert name != "shape" or raised.value.__notes__ == ["(in 1 of Sequential)"]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_normalizations_of_weights_in_hooks_and_parametrizations_are_lifted():
    for normalize in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        module = nn.Sequential(normalize(nn.Linear(3, 3)))
        model, params, buffers = from_module(module)
        torch.testing.assert_close(model.apply(params, buffers, X)[0], module(X).detach())
        turned = {n: p.flip(0) for n, p in params.items()}
        out, _ = model.apply(turned, buffers, X)
        assert not torch.allclose(out, module(X))
        torch.testing.assert_close(model.to_module(turned, buffers)(X), out)


def test_a_dropout_may_have_a_forward_and_a_rate_of_its_own():
    class Doubles(nn.Dropout):
        def __init__(self):
            super().__init__()
            self.p = None

        def forward(self, x):
            return 2 * x if self.training else x

    torch.testing.assert_close(lift(Doubles).apply({}, {}, X, train=True)[0], 2 * X)


def test_recurrent_networks_are_lifted():
    model = lift(nn.GRU, 3, 4, 2, batch_first=True)
    params, buffers = model.init(random.key(0))
    out, last = model.apply(params, buffers, X[None])[0]
    expected, theirs = model.to_module(params, buffers)(X[None])
    torch.testing.assert_close((out, last), (expected.detach(), theirs.detach()))
    scaled = {n: 2 * p for n, p in params.items()}
    assert not torch.equal(model.apply(scaled, buffers, X[None])[0][0], out)


# --- tables ------------------------------------------------------------------------------------------------------


def test_tabulate_counts_what_the_model_has_and_does():
    model = models.resnet18()
    table = model.tabulate(torch.zeros(1, 3, 224, 224))
    first = table.rows[0]
    assert (first.path, first.output, first.params) == ("", "(1, 10)", 11_181_642)
    assert first.macs == models.table("resnet18")[0].macs
    assert {row.path for row in table.rows} == {n for n, _ in model.skeleton.named_modules()}
    assert [row.path for row in model.tabulate(torch.zeros(1, 3, 64, 64), depth=1).rows] == ["", "features", "head"]
    lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 1
    assert table._repr_html_().count("<tr>") == len(lines)


def test_tabulate_says_what_it_cannot_run():
    class Reads(nn.Module):
        def forward(self, x):
            return x[: int(x.sum())]

    with pytest.raises(ValueError, match="Reads cannot be run on shapes alone: "):
        lift(Reads).tabulate(X)
    with pytest.raises(ValueError, match="depth must not be negative, got -1"):
        lift(nn.Linear, 3, 2).tabulate(X, depth=-1)


@pytest.mark.parametrize(
    ("norm", "momentum"), [(nn.BatchNorm2d, 0.1), (nn.BatchNorm2d, None), (nn.InstanceNorm2d, 0.1)]
)
def test_batches_under_vmap_renew_statistics_of_their_own(norm, momentum):
    """As tasks of a meta-learner do, and members of a population that begin with one state."""
    options = {"momentum": momentum, "affine": True, "track_running_stats": True}
    model = lift(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), norm(3, **options), nn.Flatten(), nn.Linear(12, 2)))
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    tasks = random.normal(random.key(1), (3, 4, 1, 4, 4), dtype=torch.float64)

    def loss(params, x):
        out, renewed = model.apply(params, buffers, x, train=True)
        return out.square().mean(), renewed

    one_by_one = tree.stack([torch.func.grad(loss, has_aux=True)(params, x) for x in tasks])
    at_once = torch.vmap(torch.func.grad(loss, has_aux=True), (None, 0))(params, tasks)
    assert_trees_close(at_once, one_by_one, rtol=1e-10, atol=1e-12)
    assert not at_once[1]["1.running_mean"][0].equal(at_once[1]["1.running_mean"][1])
