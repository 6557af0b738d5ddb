"""Modules of public reports (torch, functorch, timm, torchvision): lifted, each equals itself in both modes."""

import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, rnn

from holofunc import from_module, lift, models, random, tree

KEY = random.key(0)


def drawn(*shape, seed=1):
    return random.normal(random.key(seed), shape)


class Forward(nn.Module):
    """Parts, and a forward made of one function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Caches(nn.Module):
    """A buffer that is None until it is assigned, and a parameter that is None for good."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", None)
        self.register_parameter("bias", None)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.cache = x.mean(0).detach()
        return self.layer(x)


class Warms(nn.Module):
    """Counts in a buffer, and decides by it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.count += 1
            if self.count < 3:
                return 2 * self.layer(x)
        return self.layer(x)


class Extra(nn.Linear):
    """State that is no tensor."""

    def get_extra_state(self):
        return {"number": 1}

    def set_extra_state(self, state):
        self.number = state["number"]


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list


def hooked():
    layer = nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, out: out + 1)
    return layer


def packed(self, x, lengths):
    sequence = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(self.lstm(sequence)[0], batch_first=True)[0]


def lowered(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        out = self.layer(x)
    return out.float()


def lists(self, x):
    return self.parts["x"](x * self.some[0] + self.some[1] * self.named["a"])


LISTS = {
    "some": lambda: nn.ParameterList([drawn(3), drawn(3)]),
    "named": lambda: nn.ParameterDict({"a": nn.Parameter(drawn(3))}),
    "parts": lambda: nn.ModuleDict({"x": nn.Linear(3, 2)}),
}
MASK = torch.tensor([[False, False, True], [False, False, False]])
MODULES = {  # what makes one, its arguments, its arguments by name
    "hooks": (hooked, (drawn(2, 3),), {}),
    "spectral norm, old": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), (drawn(3, 4),), {}),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), (drawn(3, 2, 5, 5),), {}),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (drawn(3, 3),), {}),
    "caches": (Caches, (drawn(2, 3),), {}),
    "warms": (Warms, (drawn(2, 3),), {}),
    "extra state": (lambda: Extra(3, 2), (drawn(2, 3),), {}),
    "lists": (lambda: Forward(lists, **{name: make() for name, make in LISTS.items()}), (drawn(2, 3),), {}),
    "bag": (lambda: nn.EmbeddingBag(5, 3, mode="mean"), (torch.tensor([[0, 1], [2, 4]]),), {}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        (drawn(2, 3, 4), drawn(2, 3, 4, seed=2), drawn(2, 3, 4, seed=3)),
        {"key_padding_mask": MASK},
    ),
    "packed": (
        lambda: Forward(packed, lstm=nn.LSTM(3, 4, batch_first=True)),
        (drawn(2, 5, 3), torch.tensor([5, 3])),
        {},
    ),
    "frozen norm": (lambda: torchvision.ops.FrozenBatchNorm2d(2), (drawn(2, 2, 3, 3),), {}),
    "instance norm": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (drawn(2, 3, 5, 5),),
        {},
    ),
    "norm without scale": (lambda: nn.BatchNorm2d(3, affine=False), (drawn(2, 3, 5, 5),), {}),
    "norm without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (drawn(2, 3, 5, 5),), {}),
    "norm of all": (lambda: nn.BatchNorm2d(3, momentum=None), (drawn(2, 3, 5, 5),), {}),
    "norm of the latest": (lambda: nn.BatchNorm2d(3, momentum=1.0), (drawn(2, 3, 5, 5),), {}),
    "complex": (
        lambda: Forward(lambda self, x: (torch.fft.fft(x) * self.w).real, w=nn.Parameter(torch.tensor([1j, 2.0, 3j]))),
        (drawn(2, 3),),
        {},
    ),
    "autocast": (lambda: Forward(lowered, layer=nn.Linear(3, 2)), (drawn(2, 3),), {}),
    "compiled": (
        lambda: Forward(lambda self, x: self.layer(x), layer=torch.compile(nn.Linear(3, 2), backend="eager")),
        (drawn(2, 3),),
        {},
    ),
    "by name": (
        lambda: Forward(lambda self, *, pixels, scale=1.0: scale * self.layer(pixels), layer=nn.Linear(3, 2)),
        (),
        {"pixels": drawn(2, 3), "scale": 2.0},
    ),
    "shuffled": (
        lambda: nn.Sequential(
            nn.Unfold(2, stride=2), nn.Fold((4, 4), 2, stride=2), nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        ),
        (drawn(2, 3, 4, 4),),
        {},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_lifted_module_equals_itself(name):
    make, args, kwargs = MODULES[name]
    module = make()
    own = copy.deepcopy(module)
    model, params, buffers = from_module(module)
    for train in (False, True):
        with torch.no_grad():
            out, new = model.apply(params, buffers, *args, train=train, key=KEY, **kwargs)
            expected = own.train(train)(*args, **kwargs)
        torch.testing.assert_close(tree.leaves(out), tree.leaves(expected))
    held = dict(own.named_buffers())
    for path, x in new.items():
        torch.testing.assert_close(x, held[path])


def test_pruned_layers():
    """Their weight is computed, and has a history that torch does not copy."""
    layer, x = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5), drawn(3, 4)
    model, params, buffers = from_module(nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(model.apply(params, buffers, x)[0], layer(x).relu().detach())
    gradient = torch.func.grad(lambda p: model.apply(p, buffers, x)[0].sum())(params)
    assert (gradient["0.weight_orig"][buffers["0.weight_mask"] == 0] == 0).all()
    model = lift(lambda: nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(model.apply(*model.init(KEY), x)[0], layer(x).relu().detach())


def test_outputs_of_any_kind():
    model, params, buffers = from_module(Forward(lambda self, x: Output(self.layer(x), [x]), layer=nn.Linear(3, 2)))
    assert model.apply(params, buffers, drawn(2, 3))[0].logits.shape == (2, 2)
    model, params, buffers = from_module(
        Forward(lambda self, x, mask=None: (self.layer(x), None, [mask]), layer=nn.Linear(3, 2))
    )
    assert model.apply(params, buffers, drawn(2, 3))[0][1:] == (None, [None])


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return -gradient

    @staticmethod
    def vmap(info, dims, x):
        return Reversed.apply(x), dims[0]


def without_gradient(self, x):
    with torch.no_grad():
        x = self.first(x)
    return self.layer(x)


def hooked_map(self, x):
    out = self.layer(x)
    out.register_hook(lambda gradient: 0.1 * gradient)
    return out


GRADIENTS = {
    "reversal": lambda: Forward(lambda self, x: Reversed.apply(self.layer(x)), layer=nn.Linear(3, 2)),
    "no_grad": lambda: Forward(without_gradient, first=nn.Linear(3, 3), layer=nn.Linear(3, 2)),
    "hook": lambda: Forward(hooked_map, layer=nn.Linear(3, 2)),
    "straight through": lambda: Forward(
        lambda self, x: x.sum() + (self.layer(x).round() - self.layer(x)).detach() + self.layer(x),
        layer=nn.Linear(3, 2),
    ),
    "sparse": lambda: Forward(lambda self, x: self.layer(x.abs().long()), layer=nn.Embedding(9, 3, sparse=True)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_module(name):
    module, x = GRADIENTS[name](), drawn(4, 3)
    module(x).sum().backward()
    model, params, buffers = from_module(module)
    gradient = torch.func.grad(lambda p: model.apply(p, buffers, x)[0].sum())(params)
    for path, p in module.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        torch.testing.assert_close(gradient[path].to_dense(), expected)


def test_what_inference_mode_has_made_can_be_trained_with():
    model, params, buffers = from_module(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with torch.inference_mode():
        _, buffers = model.apply(params, buffers, drawn(4, 3), train=True)
    gradient = torch.func.grad(lambda p: model.apply(p, buffers, drawn(4, 3))[0].sum())(params)
    assert gradient["0.weight"].abs().sum() > 0


def test_whole_numbers_stay_whole():
    layer = nn.Linear(3, 2)
    layer.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    layer.register_buffer("codes", torch.ones(2, dtype=torch.uint8))
    params, buffers = lift(lambda: layer).init(KEY, dtype=torch.bfloat16)
    assert [params["weight"].dtype, *(x.dtype for x in buffers.values())] == [torch.bfloat16, torch.bool, torch.uint8]


def test_a_dropped_channel_is_dropped_as_a_whole():
    model, params, buffers = from_module(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Dropout2d(0.5)))
    zero = (model.apply(params, buffers, torch.ones(3, 2, 4, 4), train=True, key=KEY)[0] == 0).flatten(2)
    assert (zero.all(-1) == zero.any(-1)).all()
    model, params, buffers = from_module(nn.Sequential(nn.Dropout(1.0), nn.Linear(3, 2)))
    out = model.apply(params, buffers, torch.ones(2, 3), train=True, key=KEY)[0]
    torch.testing.assert_close(out, params["1.bias"].expand(2, 2))


# --- merged convolutions -----------------------------------------------------------------------------------------------


def two_readers(self, x):
    return self.first(self.conv(x)) + self.second(self.conv(x))


def twice(self, x):
    return self.norm(self.other(self.norm(self.conv(x))))


def read_before(self, x):
    out = self.conv(x)
    return self.norm(out) + out


MERGED = {  # and the shape of an input
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
    "reflected": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        (2, 4, 6, 6),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4)),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3)), (2, 3, 4)),
    "no scale": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)), (2, 4, 6, 6)),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 4, 6, 6),
    ),
    "norm in front": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), (2, 4, 6, 6)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)), (2, 4, 8)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4)),
    "two readers": (
        lambda: Forward(two_readers, conv=nn.Conv2d(3, 3, 1), first=nn.BatchNorm2d(3), second=nn.BatchNorm2d(3)),
        (2, 3, 4, 4),
    ),
    "norm twice": (
        lambda: Forward(twice, conv=nn.Conv2d(3, 3, 1), other=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)),
        (2, 3, 4, 4),
    ),
    "something between": (
        lambda: Forward(
            lambda self, x: self.norm(self.conv(x).relu()), conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)
        ),
        (2, 3, 4, 4),
    ),
    "read before": (lambda: Forward(read_before, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", MERGED)
def test_reparametrized_modules_keep_their_function(name):
    make, shape = MERGED[name]
    module, x = make(), drawn(*shape)
    for seed, part in enumerate(module.modules()):
        if hasattr(part, "running_var") and part.running_var is not None:
            part.running_mean.copy_(drawn(*part.running_mean.shape, seed=seed))
            part.running_var.copy_(drawn(*part.running_var.shape, seed=seed).square() + 0.5)
    with torch.no_grad():
        expected = module.eval()(x)
    merged = models.reparametrize(*from_module(module))
    torch.testing.assert_close(merged[0].apply(*merged[1:], x)[0], expected, rtol=1e-4, atol=1e-4)
