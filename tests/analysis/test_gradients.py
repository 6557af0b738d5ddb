"""Gradients of single samples: every method gives what a loop gives, for every kind of layer."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import holofunc
from holofunc import analysis, from_module, lift, losses, models, random, train, tree
from holofunc.train import Aux

torch.manual_seed(0)
SIDE = 9


class Functional(nn.Module):
    """Parameters that no module of torch owns: a layer scale, tokens, a standardized weight, one used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 3, 3)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 10, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.shared = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.randn(4, 4))
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.scale * self.shared(self.norm(x)).relu()
        x = self.shared(x)
        x = F.linear(x, self.raw / self.raw.norm(dim=1, keepdim=True))
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.attend = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.attend_across = nn.MultiheadAttention(6, 3, batch_first=batch_first)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)

    def forward(self, x):
        x = x.flatten(2)[:, :, :6]
        if not self.batch_first:
            x = x.transpose(0, 1)
        mask = torch.ones(x.shape[:1] * 2 if not self.batch_first else x.shape[1:2] * 2, dtype=torch.bool).triu(1)
        x = x + self.attend(x, x, x, need_weights=False, attn_mask=mask)[0]
        x = x + self.attend_across(x, x * 2, x)[0]
        return self.encoder(x).mean(1 if self.batch_first else 0)


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(5, 4, **options)

    def forward(self, x):
        return self.table((x.flatten(1)[:, :12].abs() * 3).long() % 5).cumsum(1).tanh().sum(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(SIDE, 5, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, 0])[0][:, -1]


def flat(*layers):
    return lambda: nn.Sequential(*(build() for build in layers), nn.Flatten())


def wait(kind, *args, **kwargs):
    return lambda: kind(*args, **kwargs)


LAYERS = {
    "linear": flat(nn.Flatten, wait(nn.Linear, 3 * SIDE**2, 5)),
    "linear over places": flat(wait(nn.Linear, SIDE, 4)),
    "conv": flat(wait(nn.Conv2d, 3, 4, 3, padding=1), nn.Tanh, wait(nn.Conv2d, 4, 2, 2)),
    "conv strided": flat(wait(nn.Conv2d, 3, 4, 3, stride=2), nn.Tanh, wait(nn.Conv2d, 4, 2, (2, 1), stride=(1, 2))),
    "conv dilated": flat(wait(nn.Conv2d, 3, 4, 3, dilation=2, padding=(2, 1), bias=False)),
    "conv same": flat(wait(nn.Conv2d, 3, 4, (5, 3), padding="same", dilation=(1, 2))),
    "conv grouped": flat(wait(nn.Conv2d, 3, 6, 3, groups=3), nn.Tanh, wait(nn.Conv2d, 6, 4, 1, groups=2, stride=2)),
    "conv depthwise": flat(wait(nn.Conv2d, 3, 3, 3, groups=3, padding=1)),
    "conv reflect": flat(wait(nn.Conv2d, 3, 2, 3, padding=1, padding_mode="reflect")),
    "conv many": flat(wait(nn.Conv2d, 3, 32, 3, stride=8), nn.Tanh, wait(nn.Conv2d, 32, 40, 1)),
    "conv transpose": flat(wait(nn.ConvTranspose2d, 3, 4, 3, stride=2, padding=1, output_padding=1)),
    "conv transpose grouped": flat(wait(nn.ConvTranspose2d, 3, 6, (2, 3), groups=3, dilation=2)),
    "conv transpose beyond": flat(wait(nn.ConvTranspose2d, 3, 4, 3, padding=1, dilation=3, output_padding=2)),
    "conv1d": flat(wait(nn.Flatten, 1, 2), wait(nn.Conv1d, 27, 4, 3, stride=2, padding=1)),
    "conv1d transpose": flat(wait(nn.Flatten, 1, 2), wait(nn.ConvTranspose1d, 27, 4, 3, stride=2)),
    "conv3d": flat(wait(nn.Unflatten, 1, (1, 3)), wait(nn.Conv3d, 1, 4, 2)),
    "conv3d strided": flat(
        wait(nn.Unflatten, 2, (3, 3)), wait(nn.Conv3d, 3, 6, (2, 1, 3), stride=2, dilation=(1, 2, 1), padding=1, groups=3)
    ),
    "conv3d transpose": flat(wait(nn.Unflatten, 1, (1, 3)), wait(nn.ConvTranspose3d, 1, 2, 2, stride=(1, 2, 1))),
    "batch norm": flat(wait(nn.Conv2d, 3, 4, 3), wait(nn.BatchNorm2d, 4), nn.Tanh, wait(nn.BatchNorm2d, 4, affine=False)),
    "batch norm 1d": flat(nn.Flatten, wait(nn.Linear, 3 * SIDE**2, 4), wait(nn.BatchNorm1d, 4)),
    "batch norm of itself": flat(wait(nn.Conv2d, 3, 4, 3), wait(nn.BatchNorm2d, 4, track_running_stats=False)),
    "group norm": flat(wait(nn.Conv2d, 3, 4, 3), wait(nn.GroupNorm, 2, 4)),
    "layer norm": flat(wait(nn.LayerNorm, (3, SIDE, SIDE))),
    "instance norm": flat(wait(nn.InstanceNorm2d, 3, affine=True)),
    "prelu": flat(wait(nn.PReLU, 3)),
    "embedding": Words,
    "embedding padded": lambda: Words(padding_idx=1),
    "embedding by frequency": lambda: Words(scale_grad_by_freq=True),
    "attention": lambda: Attention(True),
    "attention, sequence first": lambda: Attention(False),
    "functional": Functional,
}  # fmt: skip


def seen_in_eval(model):
    def objective(params, buffers, batch, key):
        out, buffers = model.apply(params, buffers, batch[0])
        return losses.cross_entropy(out, batch[1]), Aux(buffers, {}, out)

    return objective


def a_batch(model, count=4, side=SIDE, classes=None):
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    buffers = {
        n: b + torch.rand(b.shape, generator=generator, dtype=b.dtype) if b.is_floating_point() else b
        for n, b in buffers.items()
    }
    x = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    classes = classes or model.apply(params, buffers, x)[0].shape[1]
    return params, buffers, (x, torch.arange(count) % classes)


def norms_by_vmap(objective, params, buffers, batch):
    return analysis.per_sample_grads(objective, params, buffers, batch, reduce=tree.global_norm)


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in LAYERS.items()])
def test_taps_are_exact_for_every_layer(build):
    model = lift(build)
    state = a_batch(model)
    objective = seen_in_eval(model)
    torch.testing.assert_close(
        analysis.per_sample_grad_norms(objective, *state), norms_by_vmap(objective, *state), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("method", ["taps", "vmap"])
@pytest.mark.parametrize("name", ["layer norm", "instance norm", "batch norm of itself", "group norm", "attention"])
def test_norms_have_derivatives(name, method):
    """Mapped over samples, torch differentiates the gradients of its layer norm and instance norm wrongly."""
    model = lift(LAYERS[name])
    params, *state = a_batch(model)
    objective = seen_in_eval(model)
    along = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) for n, p in params.items()
    }

    def norms(params):
        return analysis.per_sample_grad_norms(objective, params, *state, method=method)

    def moved(step):
        return norms(tree.map(lambda p, v: p + step * v, params, along))

    slopes = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(torch.func.jvp(norms, (params,), (along,))[1], slopes, rtol=1e-4, atol=1e-6)
    grads = torch.func.grad(lambda p: norms(p).sum())(params)
    torch.testing.assert_close(sum((grads[n] * along[n]).sum() for n in grads), slopes.sum(), rtol=1e-4, atol=1e-6)


def test_norms_are_those_of_a_loop():
    model = lift(LAYERS["group norm"])
    params, buffers, (x, y) = a_batch(model)
    objective = seen_in_eval(model)
    grad = torch.func.grad(lambda p, i: objective(p, buffers, (x[i : i + 1], y[i : i + 1]), None)[0])
    expected = torch.stack([tree.global_norm(grad(params, i)) for i in range(len(x))])
    for options in ({}, {"method": "vmap"}, {"chunk_size": 3}):
        got = analysis.per_sample_grad_norms(objective, params, buffers, (x, y), **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


ZOO = [
    "smallnet", "convnext_atto", "rexnet1_0x", "mobileone_s1", "mobileone_s0", "repvit_m0_9", "convnext_femto",
    "mobileone_s2", "rexnet1_3x", "repvit_m1_0", "repvit_m1_1", "rexnet1_5x", "mobileone_s3", "convnext_pico",
    "resnet18", "rexnet2_0x", "convnext_nano", "rexnet2_2x", "darknet19", "resnet34", "darknet24", "pyconv_resnet50",
    "resnext50_32x4d", "pyconvhg_resnet50", "resnet50", "resnet50d", "res2net50_26w_4s", "repvgg_a0", "cspdarknet53",
    "cspdarknet53_mish", "convnext_tiny",
]  # fmt: skip
"""The classifiers of fewer than 30 million parameters."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("smallnet", "resnet18") else pytest.mark.slow) for name in ZOO]
)
def test_taps_are_exact_for_the_zoo(name):
    model = models.create(name, num_classes=4)
    state = a_batch(model, 2, 32, 4)
    objective = seen_in_eval(model)
    torch.testing.assert_close(
        analysis.per_sample_grad_norms(objective, *state), norms_by_vmap(objective, *state), rtol=1e-10, atol=1e-12
    )


@pytest.mark.slow
def test_no_small_classifier_is_left_out():
    found = {name: repr(models.create(name, num_classes=4)) for name in models.list_models(task="classification")}
    counts = {name: int(text.split(", ")[1].split()[0].replace(",", "")) for name, text in found.items()}
    assert sorted(name for name, count in counts.items() if count < 30_000_000) == sorted(ZOO)


VISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v3_small",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_32",
]  # fmt: skip
TIMM = [
    "convmixer_768_32", "deit_tiny_patch16_224", "efficientnet_lite0", "ghostnet_100", "hrnet_w18_small", "lcnet_050",
    "mixer_s32_224", "nf_resnet26", "resmlp_12_224", "tinynet_e", "edgenext_xx_small",
]  # fmt: skip


def lifted_norms(build, side):
    model = lift(build)
    state = a_batch(model, 2, side, 4)
    objective = seen_in_eval(model)
    torch.testing.assert_close(
        analysis.per_sample_grad_norms(objective, *state), norms_by_vmap(objective, *state), rtol=1e-10, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*performance drop")  # of the windows of Swin, under vmap
@pytest.mark.parametrize("name", VISION)
def test_taps_are_exact_for_lifted_torchvision(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    side = {"vit_b_32": 224, "alexnet": 64}.get(name, 64)
    lifted_norms(lambda: torchvision.models.get_model(name, num_classes=4, **options), side)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_taps_are_exact_for_lifted_timm(name):
    import timm

    lifted_norms(lambda: timm.create_model(name, num_classes=4), 224 if "224" in name else 64)


def test_gradients_of_some_parameters():
    model = lift(LAYERS["conv"])
    state, objective = a_batch(model), seen_in_eval(model)
    some = analysis.per_sample_grads(objective, *state, where="2")
    assert set(some) == {"2.weight", "2.bias"}
    every = analysis.per_sample_grads(objective, *state, where=lambda name: True)
    torch.testing.assert_close(some["2.weight"], every["2.weight"])
    norms = analysis.per_sample_grad_norms(objective, *state, where="2")
    torch.testing.assert_close(norms, torch.vmap(tree.global_norm)(some))
    torch.testing.assert_close(norms, analysis.per_sample_grad_norms(objective, *state, method="last_layer"))


def test_clipped_gradients_are_the_mean_of_clipped_gradients():
    model = models.smallnet()
    params, buffers, batch = a_batch(model, 5, classes=10)
    objective = seen_in_eval(model)
    grads = analysis.per_sample_grads(objective, params, buffers, batch)
    norms = torch.vmap(tree.global_norm)(grads)
    limit = norms.median()
    factors = (limit / norms).clamp_max(1)
    expected = tree.map(lambda g: (g * factors.view(-1, *[1] * (g.ndim - 1))).mean(0), grads)
    for method in ("taps", "vmap"):
        got = analysis.clipped_grads(objective, params, buffers, batch, max_norm=limit, method=method)
        torch.testing.assert_close(got, expected)
    unclipped = analysis.clipped_grads(objective, params, buffers, batch, max_norm=1e9)
    torch.testing.assert_close(unclipped, tree.map(lambda g: g.mean(0), grads))


@pytest.mark.parametrize("method", ["taps", "vmap"])
def test_a_norm_of_zero_has_a_derivative(method):
    model = lift(nn.Linear, 3, 2, bias=False)
    params, buffers, (x, y) = model.init(random.key(0))[0], {}, (torch.eye(3), torch.tensor([0, 1, 0]))
    x[1] = 0

    def norms(params):
        return analysis.per_sample_grad_norms(seen_in_eval(model), params, buffers, (x, y), method=method)

    assert norms(params)[1] == 0
    assert torch.func.grad(lambda p: norms(p).sum())(params)["weight"].isfinite().all()


def test_every_sample_draws_with_a_key_of_its_own():
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(243, 20), nn.Dropout(0.5), nn.Linear(20, 3)))
    params, buffers, (x, y) = a_batch(model, classes=3)
    objective = train.supervised(model, losses.cross_entropy)
    key = random.key(7)
    norms = analysis.per_sample_grad_norms(objective, params, buffers, (x, y), key=key)
    grad = torch.func.grad(lambda p, i: objective(p, buffers, (x[[i]], y[[i]]), random.split(key, 4)[i])[0])
    torch.testing.assert_close(norms, torch.stack([tree.global_norm(grad(params, i)) for i in range(4)]))
    with pytest.raises(ValueError, match=r"draws random numbers in .*: key must be given, got None"):
        analysis.per_sample_grad_norms(objective, params, buffers, (x, y))


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: lift(LAYERS["conv"]), id="two convolutions"),
        *(pytest.param(build, marks=pytest.mark.slow) for build in (models.smallnet, models.resnet18)),
    ],
)
def test_norms_compile_to_one_graph(build):
    model = build()
    params, buffers, batch = a_batch(model, 4, 16, 10)
    objective = seen_in_eval(model)

    def norms(params, buffers, batch):
        return analysis.per_sample_grad_norms(objective, params, buffers, batch)

    torch.testing.assert_close(holofunc.jit(norms)(params, buffers, batch), norms(params, buffers, batch))


def test_what_cannot_be_asked_is_told():
    model = models.smallnet()
    params, buffers, batch = a_batch(model, classes=10)
    training = train.supervised(model, losses.cross_entropy)
    for ask in (analysis.per_sample_grads, analysis.per_sample_grad_norms):
        with pytest.raises(ValueError, match=r"smallnet, in features.1, normalizes over the batch.*use train=False"):
            ask(training, params, buffers, batch)
    objective = analysis.in_eval_mode(training)
    with pytest.raises(ValueError, match=r"where must choose at least one parameter, got none of features.0.weight"):
        analysis.per_sample_grads(objective, params, buffers, batch, where=lambda name: False)
    with pytest.raises(ValueError, match="'nowhere'"):
        analysis.per_sample_grads(objective, params, buffers, batch, where="nowhere")
    with pytest.raises(ValueError, match="method must be 'taps', 'vmap' or 'last_layer', got 'hooks'"):
        analysis.per_sample_grad_norms(objective, params, buffers, batch, method="hooks")
    with pytest.raises(ValueError, match="must have one length, the number of samples, got \\[3, 4\\]"):
        analysis.per_sample_grads(objective, params, buffers, (batch[0], batch[1][:3]))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, or None for all samples at once, got 0"):
        analysis.per_sample_grads(objective, params, buffers, batch, chunk_size=0)
    with pytest.raises(TypeError, match=r"params must hold real floating tensors, got torch.int64 at 'count'"):
        analysis.per_sample_grads(objective, {**params, "count": torch.tensor(3)}, buffers, batch)
    with pytest.raises(ValueError, match="max_norm must be positive, got -1"):
        analysis.clipped_grads(objective, params, buffers, batch, max_norm=-1)
    with pytest.raises(TypeError, match=r"objective must come from train\.supervised"):
        analysis.in_eval_mode(lambda *_: None)
    with pytest.raises(ValueError, match=r"no rule to map aten::gru.input over samples: build the layer of operations"):
        analysis.per_sample_grad_norms(seen_in_eval(recurrent := lift(Recurrent)), *a_batch(recurrent))
    with pytest.raises(
        ValueError, match="a layer writes into a tensor that all samples share, as an embedding with max"
    ):
        analysis.per_sample_grad_norms(seen_in_eval(words := lift(Words, max_norm=0.1)), *a_batch(words))
    attention, *state = from_module(Attention(True).double())
    state.append((batch[0], batch[1] % 3))
    with pytest.raises(
        ValueError,
        match=r"no tap rule for attend_across.in_proj_weight, attend_across.out_proj.weight: fallback='vmap'",
    ):
        analysis.per_sample_grad_norms(seen_in_eval(attention), *state, fallback="error")
