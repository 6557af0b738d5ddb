"""What modules hold and do where names do not lead: closures, objects, stray tensors, inputs of any kind, modes."""

import copy
import random as python_random
import threading
from collections import UserDict, defaultdict, deque, namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holofunc import from_module, lift, random

X = random.normal(random.key(7), (4, 3))


class Net(nn.Module):
    """A layer, and a forward made of one function."""

    def __init__(self, forward, prepare=None):
        super().__init__()
        self.layer, self.run = nn.Linear(3, 3), forward
        if prepare is not None:
            prepare(self)

    def forward(self, *inputs, **options):
        return self.run(self, *inputs, **options)


def scaled(self):
    self.scale = nn.Parameter(torch.full((3,), 2.0))


# --- functions that refer to the module --------------------------------------------------------------------------


def by_lambda(self):
    scaled(self)
    self.function = lambda x: self.layer(x) * self.scale


def by_default(self):
    scaled(self)
    self.function = lambda x, me=self: me.layer(x) * me.scale


def by_hook(self):
    scaled(self)
    self.function = self.layer
    self.layer.register_forward_hook(lambda module, inputs, out: out * self.scale)


def by_list_of_partials(self):
    scaled(self)
    self.functions = [(partial(lambda y, x: self.layer(x) * y, self.scale.detach().clone()),)]
    self.function = lambda x: self.functions[0][0](x) * (self.scale / self.scale.detach())


def by_local_list(self):
    scaled(self)
    layers, forward = [self.layer], self.layer.forward
    self.function = lambda x: layers[0](x) * self.scale + 0 * forward(x)


def by_method(self):
    scaled(self)
    self.through = lambda x: self.layer(x) * self.scale
    self.function = self.through


@pytest.mark.parametrize("prepare", [by_lambda, by_default, by_hook, by_list_of_partials, by_local_list, by_method])
@pytest.mark.parametrize("ready", [False, True])
def test_functions_refer_to_the_copy(prepare, ready):
    def build():
        return Net(lambda self, x: self.function(x), prepare)

    module = build()
    model, params, buffers = from_module(module) if ready else (lift(build), *lift(build).init(random.key(0)))

    def loss(params):
        return model.apply(params, buffers, X)[0].square().sum()

    grads = torch.func.grad(loss)(params)
    plain = torch.func.grad(
        lambda p: (F.linear(X, p["layer.weight"], p["layer.bias"]) * p["scale"]).square().sum()
    )(params)  # fmt: skip
    torch.testing.assert_close(grads, plain)
    torch.testing.assert_close(model.to_module(params, buffers)(X), model.apply(params, buffers, X)[0])


@pytest.mark.parametrize(
    "prepare",
    [
        lambda self: setattr(self, "held", deque([torch.arange(3.0)])),
        lambda self: setattr(self, "held", [partial(torch.mul, torch.ones(3), torch.arange(3.0))()]),
        lambda self: setattr(self, "held", [(lambda t: lambda: t)(torch.arange(3.0))]),
        lambda self: setattr(self, "held", [SimpleNamespace(t=torch.arange(3.0))]),
    ],
)
def test_tensors_anywhere_are_constants(prepare):
    def read(self, x):
        held = self.held[0]
        return x * (held.t if isinstance(held, SimpleNamespace) else held() if callable(held) else held)

    model = lift(Net, read, prepare)
    params, buffers = model.init(random.key(0))
    torch.testing.assert_close(model.apply(params, buffers, X)[0], X * torch.arange(3.0))


def alias(self):
    self.register_buffer("count", torch.zeros(3))
    self.also = self.count
    self.__dict__["again"] = self.layer.weight


def test_attributes_may_be_further_names_of_tensors():
    def read(self, x):
        self.also.add_(1.0)
        return F.linear(x, self.again) * self.count

    for model in (lift(Net, read, alias), from_module(Net(read, alias))[0]):
        params, buffers = model.init(random.key(0))
        out, renewed = model.apply(params, buffers, X, train=True)
        torch.testing.assert_close(out, F.linear(X, params["layer.weight"]))
        assert renewed["count"].tolist() == [1.0] * 3


REFUSED = {
    "forward reads layer.weight by a reference to the tensor": (
        lambda self, x: self.f(x),
        lambda self: setattr(self, "f", partial(F.linear, weight=self.layer.weight)),
    ),
    "forward makes parameters while it runs .late.": (
        lambda self, x: setattr(self, "late", nn.Parameter(torch.zeros(3))) or x + self.late,
        None,
    ),
    "forward writes into a tensor that sums holds": (
        lambda self, x: x + self.sums[0].add_(1.0),
        lambda self: setattr(self, "sums", [torch.zeros(3)]),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_values_do_not_reach_is_refused(message):
    forward, prepare = REFUSED[message]
    for model in (lift(Net, forward, prepare), from_module(Net(forward, prepare))[0]):
        with pytest.raises(ValueError, match=f"Net cannot be a pure function: its {message}.* Workaround: "):
            model.apply(*model.init(random.key(0)), X, key=random.key(0))


def hidden_parameter(self):
    self.list = [nn.Parameter(torch.ones(3))]


def hidden_buffer(self):
    self.register_buffer("sum", torch.ones(3))
    self.list = [self.sum]


def itself(self):
    self.layer.outer = self


def dotted(self):
    self._modules["a.b"] = nn.Linear(3, 3)


class Merges(nn.Linear):
    """As LoRA's layers do."""

    def train(self, mode=True):
        super().train(mode)
        self.weight.data += 1.0 if mode else -1.0
        return self


class Grows(nn.Linear):
    def train(self, mode=True):
        super().train(mode)
        self.weight = nn.Parameter(self.weight.detach().clone())
        return self


UNLIFTED = {
    "list hides a parameter that has no name": (ValueError, hidden_parameter),
    "list hides sum in a list": (ValueError, hidden_buffer),
    "layer has itself, or what it is in, as its part 'outer'": (ValueError, itself),
    "the module has 'a.b' in it: a dot in a name": (ValueError, dotted),
    "lock, a lock, cannot be copied": (TypeError, lambda self: setattr(self, "lock", threading.Lock())),
    "Net writes into merges.weight when its mode is set to eval": (
        ValueError,
        lambda self: setattr(self, "merges", Merges(3, 3)),
    ),
    "Net replaces grows.weight when its mode is set to eval": (
        ValueError,
        lambda self: setattr(self, "grows", Grows(3, 3)),
    ),
}


@pytest.mark.parametrize("message", UNLIFTED)
def test_what_cannot_be_lifted_is_named(message):
    error, prepare = UNLIFTED[message]
    with pytest.raises(error, match=message):
        lift(Net, None, prepare)


def test_a_mode_may_freeze():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].requires_grad_(False)
            for p in self[1].parameters():
                p.requires_grad = False
            self[1].eval()
            return self

    model = lift(lambda: Frozen(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    params, buffers = model.init(random.key(0))
    assert all(model.frozen.values())
    assert torch.equal(model.apply(params, buffers, X, train=True)[1]["1.running_mean"], torch.zeros(3))


# --- what is handed over -----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")


class Record:
    def __init__(self, **fields):
        vars(self).update(fields)

    def __getitem__(self, name):
        return getattr(self, name)


INPUTS = {
    "namedtuple": Pair(X, X),
    "defaultdict": defaultdict(lambda: 0, a=X, b=X),
    "UserDict": UserDict(a=X, b=X),
    "object": Record(a=X, b=X),
    "nested": Record(a=X, b=X, c=[Record(a=X)]),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_any_kind_are_left_alone(kind):
    def forward(self, given):
        a, b = given if isinstance(given, tuple) else (given["a"], given["b"])
        a.mul_(2.0)  # it is b, too
        if kind == "nested":
            given.c.append(1)
            given.new = given.c[0].a.add_(0.0)
        return self.layer(b)

    model = lift(Net, forward)
    params, buffers = model.init(random.key(0))
    before, given = X.clone(), INPUTS[kind]
    out, _ = model.apply(params, buffers, given)
    torch.testing.assert_close(out, F.linear(2 * X, params["layer.weight"], params["layer.bias"]))
    assert torch.equal(X, before)
    assert kind != "nested" or (len(given.c) == 1 and not hasattr(given, "new"))


WRITES = {
    "numpy": lambda self, x: x.numpy().fill(0.0),
    "asarray": lambda self, x: np.asarray(x).fill(0.0),
    "foreach": lambda self, x: torch._foreach_mul_([x, self.layer.weight], 0.0),
    "batch_norm": lambda self, x: torch.batch_norm(
        x, None, None, self.layer.bias.detach(), self.layer.weight[0].detach(), True, 0.1, 1e-5, False
    ),
    "instance_norm": lambda self, x: F.instance_norm(
        x.T[None], self.layer.bias.detach(), self.layer.weight[0].detach()
    ),
    "caught": lambda self, x: self.layer.load_state_dict({n: p + 1 for n, p in self.layer.state_dict().items()}),
    "data": lambda self, x: setattr(self.layer.weight, "data", self.layer.weight.data * 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_of_the_callers_is_written_into(name):
    def forward(self, x):
        WRITES[name](self, x)
        return self.layer(x)

    model = lift(Net, forward)
    params, buffers = model.init(random.key(0))
    given = (X.clone(), *params.values())
    before = [x.clone() for x in given]
    for _ in range(2):
        model.apply(params, buffers, given[0])
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_what_a_forward_sets_anywhere_is_forgotten():
    def prepare(self):
        self.norm, self.config = nn.BatchNorm1d(3), SimpleNamespace(calls=0)

    def forward(self, x):
        self.config.calls += 1
        out = self.norm(x) * self.config.calls
        self.norm.momentum *= 0.5
        self.norm.eval()
        return out

    model = lift(Net, forward, prepare)
    params, buffers = model.init(random.key(0))
    once, again = (model.apply(params, buffers, X, train=True) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


WRONG = {
    "key must be one of holofunc.random, int64 of shape .2,., got torch.float32 of shape .4, 3.": {"key": X},
    "key must be one of holofunc.random, int64 of shape .2,., got 3": {"key": 3},
    "train must be True or False, got tensor.True.": {"train": torch.tensor(True)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_key_and_a_mode_are_checked(message):
    model = lift(nn.Linear, 3, 2)
    with pytest.raises((ValueError, TypeError), match=message):
        model.apply(*model.init(random.key(0)), X, **WRONG[message])


def test_values_are_tensors():
    model = lift(nn.Linear, 3, 2)
    params, buffers = model.init(random.key(0))
    with pytest.raises(TypeError, match=r"params must be tensors, got list for bias \(Linear.apply\)"):
        model.apply({**params, "bias": [0.0, 0.0]}, buffers, X)


def test_a_forward_may_call_its_arguments_params():
    model = lift(Net, lambda self, x, params=1.0: self.layer(x) * params)
    params, buffers = model.init(random.key(0))
    doubled = model.apply(params, buffers, X, params=2.0)[0]
    torch.testing.assert_close(doubled, 2 * model.apply(params, buffers, X)[0])


# --- constructors ------------------------------------------------------------------------------------------------


def test_constructors_draw_from_the_key_alone():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            drawn = [python_random.gauss(0, 1), float(np.random.rand()), float(torch.rand(1, device="cpu"))]  # noqa: NPY002
            self.drawn = nn.Parameter(torch.tensor(drawn))

    def states():
        return repr((torch.get_rng_state().tolist(), python_random.getstate(), np.random.get_state()))  # noqa: NPY002

    before, model = states(), lift(Drawn)
    (once, _), (again, _), (other, _) = (model.init(random.key(seed)) for seed in (1, 1, 2))
    assert torch.equal(once["drawn"], again["drawn"])
    assert not torch.equal(once["drawn"][:2], other["drawn"][:2])
    assert states() == before


def test_values_that_a_constructor_takes_over_stay_the_callers():
    ready = nn.Linear(3, 3).state_dict()

    def build():
        layer = nn.Linear(3, 3)
        layer.load_state_dict(ready, assign=True)
        return nn.Sequential(layer)

    params, _ = lift(build).init(random.key(0))
    assert torch.equal(params["0.weight"], ready["weight"])
    assert params["0.weight"].data_ptr() != ready["weight"].data_ptr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lift(nn.Sequential, (m for m in ())), TypeError, "arguments of build must be such that they can be copied"),
        (lambda: lift(nn.Linear, 3, 3, device="meta").init(random.key(0)), ValueError, "weight of Linear has no values"),
        (lambda: from_module(nn.Linear(3, 3, device="meta")), ValueError, "weight of Linear is on the meta device"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_anew_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- models ------------------------------------------------------------------------------------------------------


def test_copies_of_a_model_are_the_model():
    model = lift(nn.Linear, 3, 2)
    assert copy.deepcopy({"model": model})["model"] is model


def test_threads_do_not_meet():
    model = lift(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))
    params, buffers = model.init(random.key(0))

    def run(seed):
        return model.apply({n: p * seed for n, p in params.items()}, buffers, X, train=True, key=random.key(seed))

    found = {seed: [] for seed in (1, 2, 3)}
    threads = [
        threading.Thread(target=lambda seed=seed: found[seed].extend(run(seed) for _ in range(20))) for seed in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, outs in found.items():
        assert len(outs) == 20
        for out in outs:
            torch.testing.assert_close(out, run(seed), rtol=0, atol=0)
