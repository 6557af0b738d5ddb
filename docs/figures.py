"""The pictures of `layers.md`, each of a real call on real digits: ``python docs/figures.py [FOLDER]``."""

import io
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from holofunc import data, lift, losses, nn, optim, random, train
from holofunc.ops import boxes
from holofunc.plots import drawing

FOLDER = Path(__file__).parent / "img/layers"
BLUE, ORANGE, GREEN, PURPLE = drawing.COLORS[:4]
IMAGE, SIGNED, SHARE = "gray_r", "RdBu_r", "YlOrBr"
DIGITS, LABELS = data.digits("train")


# --- the paper ---------------------------------------------------------------------------------------------------


def sheet(rows: int, columns: int, width: float, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flatten())


def show(axes: Axes, image: Tensor, title: str = "", below: str = "", cmap: str = IMAGE, most: float = 0.0) -> None:
    """An image, from 0 to its maximum or from minus to plus its largest value, unless `most` is given."""
    most = most or image.abs().max().item()
    axes.imshow(image.detach().numpy(), cmap=cmap, vmin=-most if cmap == SIGNED else 0, vmax=most)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=8)
    frame(axes)


def frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.6)


def row(images: Mapping[str, Tensor], below: Sequence[str] = (), **options: object) -> Figure:
    """Images side by side, their titles the keys."""
    figure, cells = sheet(1, len(images), 7.0, 7.0 / max(4, len(images)) + 0.45)
    for axes, (title, image), text in zip(cells, images.items(), below or [""] * len(images), strict=True):
        show(axes, image, title, text, **options)
    return figure


def chart(x: Tensor, lines: Mapping[str, Tensor], xlabel: str, ylabel: str, **options: object) -> Figure:
    """Lines over `x`, named at the right; what others do instead, named in brackets, is dashed."""
    figure, (axes,) = sheet(1, 1, 7.0, 2.5)
    curves(axes, x, lines)
    axes.set(xlabel=xlabel, ylabel=ylabel, **options)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def curves(axes: Axes, x: Tensor, lines: Mapping[str, Tensor]) -> None:
    colors = iter(drawing.COLORS)
    for name, y in lines.items():
        other = name.startswith("(")
        color = drawing.FAINT if other else next(colors)
        axes.plot(
            x.numpy(), y.detach().numpy(), label=name, color=color, linewidth=1.8, linestyle="--" if other else "-"
        )
    axes.grid()
    axes.margins(x=0)


def save(figure: Figure, path: Path) -> None:
    """A PNG of 128 colours: a third of the size, for the same picture."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        Image.open(file).convert("RGB").quantize(128, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


# --- what is drawn -----------------------------------------------------------------------------------------------


def large(index: int, size: int = 32) -> Tensor:
    """A digit with smooth edges, (1, 1, size, size)."""
    return F.interpolate(DIGITS[index, None], (size, size), mode="bicubic").clamp(0, 1)


def edges(image: Tensor) -> Tensor:
    """Four maps of an image, (1, 4, H, W): how dark it gets from left, right, top and bottom."""
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 8
    filters = torch.stack([sobel, -sobel, sobel.T, -sobel.T])[:, None]
    return F.conv2d(F.pad(image, [1] * 4, mode="replicate"), filters).relu()


def built(build: Callable[..., torch.nn.Module], *args: object, **options: object) -> torch.nn.Module:
    model = lift(build, *args, **options)
    return model.to_module(*model.init(random.key(0)))


@cache
def network() -> torch.nn.Module:
    """A classifier with the layers to look at, after three epochs of digits, in eval mode."""

    def build() -> torch.nn.Module:
        layers = {
            "stem": torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16)),
            "sam": nn.SAM(16),
            "triplet": nn.TripletAttention(),
            "involution": nn.Involution2d(16, 3, padding=1, groups=4),
            "slim": nn.SlimConv2d(16, 3, padding=1),
            "tail": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(12, 32, 3), torch.nn.ReLU()),
            "head": torch.nn.Sequential(nn.GlobalAvgPool2d(flatten=True), torch.nn.Linear(32, 10)),
        }
        return torch.nn.Sequential(OrderedDict(layers))

    model, tx = lift(build), optim.adamw(1e-2)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(0))
    batches = data.Batches((DIGITS, LABELS), 128, key=random.key(1))
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            state, _ = step(state, batch)
    return model.to_module(state.params, state.buffers)


def reaching(name: str, images: Tensor) -> tuple[torch.nn.Module, Tensor]:
    """A layer of the network, and what comes to it when these images are classified."""
    inside = list(dict(network().named_children()))
    return getattr(network(), name), network()[: inside.index(name)](images)


def logits_of(p: Tensor) -> Tensor:
    """Logits of two classes, (N, 2), such that the first has probability `p`."""
    return torch.stack([p.log(), (1 - p).log()], 1)


# --- activations -------------------------------------------------------------------------------------------------


def hard_mish() -> Figure:
    x = torch.linspace(-4, 3, 200)
    lines = {"HardMish": nn.HardMish()(x), "(Mish)": F.mish(x)}
    return chart(x, lines, "x", "y")


def nl_relu() -> Figure:
    x = torch.linspace(-2, 8, 200)
    lines = {f"beta={beta}": nn.NLReLU(beta)(x) for beta in (4.0, 1.0, 0.25)}
    return chart(x, {**lines, "(ReLU)": F.relu(x)}, "x", "y", ylim=(-0.2, 4))


def frelu() -> Figure:
    x = large(5) - 0.5
    model = lift(nn.FReLU, 1)
    params, buffers = model.init(random.key(0))
    params["conv.weight"] = torch.tensor([[[[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]]]) / 3
    layer = model.to_module(params, buffers)
    maps = {"x": x, "(relu(x))": x.relu(), "threshold": layer.bn(layer.conv(x)), "FReLU": layer(x)}
    return row({name: image[0, 0, 1:-1, 1:-1] for name, image in maps.items()}, cmap=SIGNED, most=0.6)


# --- attention ---------------------------------------------------------------------------------------------------


def sam() -> Figure:
    layer, x = reaching("sam", DIGITS[:7])
    weights = torch.sigmoid(layer.conv(x))
    figure, cells = sheet(2, 7, 7.0, 2.4)
    for i in range(7):
        show(cells[i], DIGITS[i, 0])
        show(cells[7 + i], weights[i, 0], cmap=SHARE, most=1.0)
    cells[0].set_ylabel("digit")
    cells[7].set_ylabel("weight")
    return figure


def triplet_attention() -> Figure:
    layer, x = reaching("triplet", DIGITS[3, None])
    gates = layer.c_branch(x)[0, 0], layer.h_branch(x)[0, :, 0], layer.w_branch(x)[0, :, :, 0]
    figure, cells = sheet(1, 4, 7.0, 2.2, width_ratios=[1, 1, 0.6, 0.6])
    show(cells[0], DIGITS[3, 0], "digit")
    places = ("height", "width"), ("channels", "width"), ("channels", "height")
    for axes, gate, name, (left, below) in zip(cells[1:], gates, ("c", "h", "w"), places, strict=True):
        show(axes, gate, f"{name}_branch", below, SHARE, 1.0)
        axes.set_ylabel(left, fontsize=8)
    return figure


def lambda_layer() -> Figure:
    x = large(2, 16)
    options = {"r=3": {"r": 3}, "r=7": {"r": 7}, "n=256": {"n": 256}}
    figure, cells = sheet(1, 4, 7.0, 2.2)
    show(cells[0], x[0, 0], "digit", "one pixel asks")
    cells[0].plot(7, 8, "o", color=ORANGE)
    for axes, (name, option) in zip(cells[1:], options.items(), strict=True):
        layer = built(nn.LambdaLayer, 1, 16, 8, **option)
        answer = torch.func.jacrev(lambda x, layer=layer: layer(x)[0, :, 8, 7])(x).flatten(1).norm(dim=0)
        show(axes, (answer.view(16, 16) / answer.max()).log10() + 4, name, cmap=SHARE, most=4.0)
    return figure


# --- convolutions ------------------------------------------------------------------------------------------------


def norm_conv2d() -> Figure:
    page = torch.cat([*DIGITS[:9, 0]], 1)
    lit = 0.2 + (0.2 + page) * torch.linspace(1.0, 0.05, page.shape[1])
    weight = torch.tensor([[[[-1.0, 0.0, 1.0]] * 3]])
    figure, cells = sheet(3, 1, 7.0, 3.4)
    show(cells[0], lit, "digits in fading light")
    show(cells[1], F.conv2d(lit[None, None], weight)[0, 0], "(Conv2d)", cmap=SIGNED)
    show(cells[2], nn.functional.norm_conv2d(lit[None, None], weight)[0, 0], "NormConv2d, same filter", cmap=SIGNED)
    return figure


def add2d() -> Figure:
    page, filters = torch.cat([*DIGITS[:9, 0]], 1)[None, None], DIGITS[3, None]
    figure, (top, left) = sheet(2, 1, 7.0, 2.8, sharex=True, height_ratios=[1, 1.2])
    show(top, page[0, 0], "digits; the filter is the 3")
    top.add_patch(Rectangle((23.5, -0.5), 8, 8, fill=False, edgecolor=ORANGE, linewidth=2))
    x = torch.arange(65) + 3.5
    right = left.twinx()
    curves(right, x, {"(Conv2d)": F.conv2d(page, filters).flatten()})
    curves(left, x, {"Add2d": nn.functional.add2d(page, filters).flatten()})
    left.set_ylabel("Add2d", color=BLUE)
    right.set_ylabel("Conv2d", color=drawing.FAINT)
    left.set(xlim=(-0.5, 71.5), xticks=[])
    right.set(yticks=[])
    return figure


def slim_conv2d() -> Figure:
    layer, x = reaching("slim", DIGITS[2, None])
    pooled = nn.functional.global_avg_pool2d(x)
    weights = torch.sigmoid(layer.fc2(torch.relu(layer.bn(layer.fc1(pooled))))).flatten()
    figure, cells = sheet(2, 1, 7.0, 2.6, sharex=True, sharey=True)
    for axes, values, name in zip(cells, (weights, weights.flip(0)), ("w", "w, flipped"), strict=True):
        axes.bar(
            range(16),
            values.tolist(),
            color=[BLUE] * 8 + [ORANGE] * 8 if axes is cells[0] else [ORANGE] * 8 + [BLUE] * 8,
        )
        axes.set(ylim=(0, 1), title=name, xticks=range(16), ylabel="weight")
    cells[1].set_xlabel("channel")
    return figure


def pyconv2d() -> Figure:
    point = F.pad(torch.ones(1, 1, 1, 1), [7] * 4)
    levels = built(nn.PyConv2d, 1, 4, 3, num_levels=4, padding=1, bias=False)(point)[0]
    return row({f"{3 + 2 * i} x {3 + 2 * i}": level for i, level in enumerate(levels)}, cmap=SIGNED)


def involution2d() -> Figure:
    layer, x = reaching("involution", DIGITS[4, None])
    kernels = layer.span(layer.reduce(x))[0, :9]  # of the first group
    tiles = kernels.view(3, 3, 8, 8).permute(2, 0, 3, 1).reshape(24, 24)
    figure, cells = sheet(1, 3, 7.0, 2.5)
    show(cells[0], DIGITS[4, 0], "digit")
    show(cells[1], network().stem[0].weight[0, 0].repeat(8, 8), "(Conv2d): one kernel", cmap=SIGNED)
    show(cells[2], tiles, "Involution2d: 64 kernels", cmap=SIGNED, most=tiles.abs().quantile(0.98).item())
    for axes in cells[1:]:
        for line in range(3, 24, 3):
            axes.axhline(line - 0.5, color=drawing.INK, linewidth=0.8)
            axes.axvline(line - 0.5, color=drawing.INK, linewidth=0.8)
    return figure


# --- pooling and downsampling ------------------------------------------------------------------------------------


def concat_downsample2d() -> Figure:
    x = 0.15 + 0.85 * DIGITS[2, None]
    channels = nn.ConcatDownsample2d(2)(x)[0]
    tints = [matplotlib.colormaps[name] for name in ("Blues", "Oranges", "Greens", "Purples")]
    figure, cells = sheet(1, 5, 7.0, 1.9, width_ratios=[2, 1, 1, 1, 1])
    mixed = np.zeros((8, 8, 4))
    for channel, tint in enumerate(tints):
        small = tint(channels[channel].numpy())
        mixed[channel // 2 :: 2, channel % 2 :: 2] = small
        cells[1 + channel].imshow(small)
        cells[1 + channel].set_title(f"channel {channel}", fontsize=9)
    cells[0].imshow(mixed)
    cells[0].set_title("8 x 8", fontsize=9)
    for axes in cells:
        frame(axes)
    return figure


def global_avg_pool2d() -> Figure:
    maps = edges(large(3))
    means = nn.GlobalAvgPool2d(flatten=True)(maps)[0]
    names = ("from left", "from right", "from top", "from bottom")
    return row(dict(zip(names, maps[0], strict=True)), [f"mean {mean:.3f}" for mean in means], most=0.3)


def global_max_pool2d() -> Figure:
    maps = edges(large(3))
    peaks = nn.GlobalMaxPool2d(flatten=True)(maps)[0]
    names = ("from left", "from right", "from top", "from bottom")
    figure = row(dict(zip(names, maps[0], strict=True)), [f"maximum {peak:.3f}" for peak in peaks], most=0.3)
    for axes, image in zip(figure.axes, maps[0], strict=True):
        y, x = divmod(int(image.argmax()), 32)
        axes.plot(x, y, "o", markersize=12, fillstyle="none", color=ORANGE, markeredgewidth=2)
    return figure


def blur_pool2d() -> Figure:
    side = torch.linspace(-32, 32, 64)
    rings = 0.5 + 0.5 * torch.cos(torch.pi / 64 * (side[:, None] ** 2 + side**2))[None, None]
    kinds = {"x": rings, "(every second pixel)": rings[..., ::2, ::2]}
    blurred = {f"kernel_size={size}": nn.BlurPool2d(1, kernel_size=size)(rings) for size in (3, 5)}
    return row({name: image[0, 0] for name, image in (kinds | blurred).items()}, most=1.0)


def spp() -> Figure:
    sizes = 5, 9, 13
    maps = nn.SPP(sizes)(edges(large(8))[:, :1])[0]
    return row(dict(zip(("x", *(f"{size} x {size}" for size in sizes)), maps, strict=True)))


def z_pool() -> Figure:
    maps = edges(large(3))
    highest, mean = nn.ZPool(1)(maps)[0]
    names = ("from left", "from right", "from top", "from bottom")
    return row({**dict(zip(names, maps[0], strict=True)), "maximum": highest, "mean": mean}, most=0.3)


# --- randomness --------------------------------------------------------------------------------------------------


def zeroed(axes: Axes, image: Tensor, dropped: Tensor, title: str, below: str) -> None:
    """An image, and in orange what of it was dropped."""
    show(axes, image, title, below, most=1.0)
    axes.imshow(np.ma.masked_equal(dropped.numpy(), 0), cmap="autumn", vmin=-1, vmax=1.6)


def dropout() -> Figure:
    figure, cells = sheet(1, 4, 7.0, 2.2)
    for axes, p in zip(cells, (0.0, 0.1, 0.3, 0.5), strict=True):
        kept = nn.functional.dropout(torch.ones(32, 32), p, key=random.key(0))
        zeroed(axes, large(3)[0, 0], kept == 0, f"p={p}", f"{(kept == 0).float().mean():.1%} dropped")
    return figure


def drop_block2d() -> Figure:
    figure, cells = sheet(1, 4, 7.0, 2.2)
    for axes, size in zip(cells, (1, 3, 7, 12), strict=True):
        kept = nn.functional.dropblock2d(torch.ones(2000, 1, 32, 32), 0.2, size, key=random.key(0))
        share = (kept == 0).float().mean()
        zeroed(axes, large(3)[0, 0], kept[7, 0] == 0, f"block_size={size}", f"{share:.1%} of 2000 maps")
    return figure


def drop_path() -> Figure:
    x = DIGITS[:9]
    kept = nn.functional.drop_path(x, 0.3, key=random.key(2))
    figure, cells = sheet(2, 9, 7.0, 1.9)
    for i in range(9):
        show(cells[i], x[i, 0], most=1.5)
        show(cells[9 + i], kept[i, 0], most=1.5)
    cells[0].set_ylabel("x")
    cells[9].set_ylabel("DropPath(0.3)", fontsize=8)
    return figure


# --- losses of labels --------------------------------------------------------------------------------------------

P = torch.linspace(0.01, 0.99, 197)
FIRST = torch.zeros(197, dtype=torch.int64)
OF_LABEL = "probability of the label"


def cross_entropy() -> Figure:
    lines = {
        f"label_smoothing={e}": losses.cross_entropy(logits_of(P), FIRST, label_smoothing=e, reduction="none")
        for e in (0.0, 0.1, 0.3)
    }
    return chart(P, lines, OF_LABEL, "cross_entropy", ylim=(0, 4), xlim=(0, 1))


def binary_cross_entropy() -> Figure:
    def loss(target: float, weight: float) -> Tensor:
        logits, weights = (P / (1 - P)).log()[:, None], torch.tensor([weight])
        targets = torch.full_like(logits, target)
        return losses.binary_cross_entropy(logits, targets, pos_weight=weights, reduction="none")[:, 0]

    lines = {"target 1, pos_weight=3": loss(1.0, 3.0), "target 1": loss(1.0, 1.0), "target 0": loss(0.0, 1.0)}
    return chart(P, lines, "predicted probability", "binary_cross_entropy", ylim=(0, 5), xlim=(0, 1))


def focal() -> Figure:
    lines = {
        f"gamma={gamma}": losses.focal(logits_of(P), FIRST, gamma=gamma, reduction="none")
        for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)
    }
    return chart(P, lines, OF_LABEL, "focal", ylim=(0, 4), xlim=(0, 1))


def poly() -> Figure:
    lines = {f"eps={eps}": losses.poly(logits_of(P), FIRST, eps=eps, reduction="none") for eps in (2.0, 1.0, 0.0, -1.0)}
    return chart(P, lines, OF_LABEL, "poly", ylim=(0, 5), xlim=(0, 1))


def multilabel_cross_entropy() -> Figure:
    x = torch.linspace(-4, 10, 200)
    logits = torch.stack([x, torch.zeros(200), torch.full((200,), -3.0)], 1)
    targets = torch.tensor([[1.0, 1.0, 0.0]]).expand(200, 3)
    lines = {
        "multilabel_cross_entropy": losses.multilabel_cross_entropy(logits, targets, reduction="none"),
        "(binary_cross_entropy)": losses.binary_cross_entropy(logits, targets, reduction="none").sum(1),
    }
    return chart(x, lines, "logit of one label, 0 for the other", "loss", ylim=(0, 8))


def complement_cross_entropy() -> Figure:
    rest = torch.tensor(0.5) * torch.stack([P, 1 - P], 1)
    logits = torch.cat([torch.full((197, 1), 0.5), rest], 1).log()
    lines = {
        f"gamma={gamma}": losses.complement_cross_entropy(logits, FIRST, gamma=gamma, reduction="none")
        for gamma in (0.0, -1.0, -2.0)
    }
    return chart(P, lines, "one wrong class's share of what is not the label's 0.5", "loss", xlim=(0, 1))


def class_balanced() -> Figure:
    counts = torch.logspace(0, 4, 60).round()
    label = torch.arange(60)

    def weight(beta: float) -> Tensor:
        loss = losses.class_balanced(losses.cross_entropy, counts, beta)
        return loss(torch.zeros(60, 60), label, reduction="none") / np.log(60)

    lines = {f"beta={beta}": weight(beta) for beta in (0.999, 0.99, 0.9, 0.0)}
    return chart(counts, lines, "samples of the class", "its weight", xscale="log", yscale="log")


def sigmoid_focal() -> Figure:
    logits = torch.special.logit(P)[:, None]

    def loss(target: float, gamma: float) -> Tensor:
        targets = torch.full_like(logits, target)
        return losses.sigmoid_focal(logits, targets, gamma=gamma, reduction="none")[:, 0]

    lines = {f"target={t}, gamma={g}": loss(t, g) for t in (1.0, 0.0) for g in (2.0, 0.0)}
    return chart(P, lines, "probability of yes", "loss", ylim=(0, 3))


def kl_divergence() -> Figure:
    teacher = torch.tensor([[0.0, 2.0]]).expand(len(P), 2)
    lines = {
        f"temperature={t:g}": losses.kl_divergence(logits_of(P).flip(1), teacher, temperature=t, reduction="none")
        for t in (1.0, 2.0, 4.0)
    }
    return chart(P, lines, "probability that the student gives to what the teacher gives 0.88", "loss", ylim=(0, 3))


def huber() -> Figure:
    error, zero = torch.linspace(-3, 3, 201), torch.zeros(201)
    lines = {
        "huber, delta=1": losses.huber(error, zero, reduction="none"),
        "smooth_l1, beta=0.3": losses.smooth_l1(error, zero, beta=0.3, reduction="none"),
        "(half the square)": error**2 / 2,
    }
    return chart(error, lines, "error", "loss", ylim=(0, 3))


def embeddings() -> Figure:
    angle = torch.linspace(0, math.pi, 201)
    points, fixed = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([[1.0, 0.0]]).expand(201, 2)
    other, opposite = torch.zeros(201, dtype=torch.bool), -fixed
    lines = {
        "cosine, similar": losses.cosine(points, fixed, reduction="none"),
        "cosine, not": losses.cosine(points, fixed, similar=other, reduction="none"),
        "triplet": losses.triplet(points, fixed, opposite, reduction="none"),
    }
    return chart(angle / math.pi * 180, lines, "angle to the embedding it should be near, in degrees", "loss")


def contrast() -> Figure:
    angle = torch.linspace(0, math.pi, 61)
    around = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

    def loss(a: Tensor, temperature: float) -> Tensor:
        moved = torch.cat([torch.stack([a.cos(), a.sin()])[None], around])
        return losses.nt_xent(torch.cat([torch.tensor([[1.0, 0.0]]), around]), moved, temperature=temperature)

    lines = {f"temperature={t}": torch.stack([loss(a, t) for a in angle]) for t in (0.5, 0.2, 0.1)}
    return chart(angle / math.pi * 180, lines, "angle between two views of one of four images", "nt_xent")


# --- losses of maps and sequences --------------------------------------------------------------------------------


def mutual_channel() -> Figure:
    side = torch.arange(24.0)
    figure, cells = sheet(1, 4, 7.0, 2.2)
    for axes, apart in zip(cells, (0, 3, 6, 12), strict=True):
        bumps = [(-((side - 12 - s * apart / 2) ** 2 + (side[:, None] - 12) ** 2) / 16).exp() for s in (-1, 1)]
        channels = 6 * torch.stack(bumps)[None]
        options = {"targets": torch.tensor([0]), "xi": 2}
        diversity = losses.mutual_channel(channels, alpha=0.0, **options) - losses.mutual_channel(channels, **options)
        colors = [np.array(matplotlib.colors.to_rgb(color)) for color in (BLUE, ORANGE)]
        ink = sum(bump.numpy()[..., None] * (1 - color) for bump, color in zip(bumps, colors, strict=True))
        axes.imshow((1 - ink).clip(0, 1))
        axes.set_title(f"h = {diversity:.2f}", fontsize=9)
        frame(axes)
    return figure


def dice() -> Figure:
    radius = torch.linspace(0.1, 1.9, 60)
    side = torch.linspace(-2, 2, 200)
    distance = (side**2 + side[:, None] ** 2).sqrt()
    logits = 200 * (radius[:, None, None] - distance)[:, None]
    truth = (distance < 1).long().expand(60, 200, 200)

    def loss(gamma: float) -> Tensor:
        options = {"activation": "sigmoid", "squared": False, "gamma": gamma, "reduction": "none"}
        return losses.dice(logits, truth, **options)

    lines = {f"gamma={gamma}": loss(gamma) for gamma in (3.0, 1.0, 0.3)}
    return chart(radius**2, lines, "predicted area, of a true area of 1", "dice", ylim=(0, 1), xlim=(0, 3.6))


def regions() -> Figure:
    place = torch.linspace(-1, 1, 64)
    radius = (place**2 + place[:, None] ** 2).sqrt()
    truth, sizes = (radius < 0.5).long()[None], torch.linspace(0.05, 0.95, 61)

    def each(loss: Callable[..., Tensor], **options: float) -> Tensor:
        discs = [(40 * (size - radius)).clamp(-20, 20) for size in sizes]
        return torch.stack([loss(torch.stack([-disc, disc])[None], truth, **options) for disc in discs])

    lines = {
        "tversky, beta=0.7": each(losses.tversky),
        "generalized_dice": each(losses.generalized_dice),
        "lovasz": each(losses.lovasz),
        "(dice)": each(losses.dice),
    }
    return chart(sizes, lines, "radius of the predicted disc; the true one has 0.5", "loss", ylim=(0, 1))


def ctc() -> Figure:
    frames, symbols = 24, "-holfunc"
    spoken = torch.tensor([[symbols.index(letter) for letter in "holofunc"]])
    logits = torch.zeros(frames, 1, len(symbols))
    pull = torch.func.grad(lambda logits: losses.ctc(logits, spoken, reduction="sum"))(logits)
    figure, (axes,) = sheet(1, 1, 7.0, 2.5)
    axes.imshow((logits.softmax(-1) - pull)[:, 0].T.numpy(), cmap=SHARE, aspect="auto", vmin=0)
    axes.set(yticks=range(len(symbols)), yticklabels=["blank", *symbols[1:]], xlabel="frame")
    axes.spines[:].set(visible=True)
    return figure


# --- boxes -------------------------------------------------------------------------------------------------------

BOX = torch.tensor([0.0, 0.0, 1.0, 1.0])


def box_losses() -> Figure:
    x = torch.linspace(0, 3, 301)
    moved = BOX + x[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    lines = {
        "giou_loss": boxes.giou_loss(BOX, moved, paired=True),
        "diou_loss, ciou_loss": boxes.diou_loss(BOX, moved, paired=True),
        "(1 - box_iou)": 1 - boxes.box_iou(BOX, moved, paired=True),
    }
    figure, (top, axes) = sheet(2, 1, 7.0, 3.4, height_ratios=[1, 3.4])
    for i, shift in enumerate((0.0, 0.5, 1.0, 2.0, 3.0)):
        top.add_patch(Rectangle((i * 5, 0), 1, 1, color=BLUE, alpha=0.5, linewidth=0))
        top.add_patch(Rectangle((i * 5 + shift, 0), 1, 1, color=ORANGE, alpha=0.5, linewidth=0))
        top.text(i * 5, -0.3, f"shift {shift:g}", ha="left", va="top", fontsize=8)
    top.set(xlim=(-0.1, 24.2), ylim=(-1.3, 1.1), aspect="equal")
    top.axis("off")
    curves(axes, x, lines)
    axes.axvspan(1, 3, color=drawing.FAINT, alpha=0.15, linewidth=0)
    axes.text(1.05, 0.1, "disjoint", color=drawing.INK)
    axes.set(xlabel="shift", ylabel="loss", ylim=(0, 1.75))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def box_shapes() -> Figure:
    ratio = torch.logspace(-3, 3, 201, base=2.0)
    half = torch.stack([ratio.sqrt(), 1 / ratio.sqrt()], 1) / 2
    others = torch.cat([0.5 - half, 0.5 + half], 1)
    lines = {
        "ciou_loss": boxes.ciou_loss(BOX, others, paired=True),
        "diou_loss": boxes.diou_loss(BOX, others, paired=True),
    }
    xlabel = "log2(width / height) of a box with the square's area and centre"
    return chart(ratio.log2(), lines, xlabel, "loss", ylim=(0, 1))


def nms() -> Figure:
    jitter = random.normal(random.key(3), (3, 6, 4), std=0.12)
    around_objects = torch.tensor([[0.0, 0.0, 1.2, 1.0], [1.6, 0.2, 2.6, 1.4], [3.0, 0.0, 3.8, 1.2]])[:, None] + jitter
    candidates, scores = around_objects.flatten(0, 1), random.uniform(random.key(4), (18,))
    kept = boxes.nms(candidates, scores, 0.4)
    figure, cells = sheet(1, 2, 7.0, 1.9)
    chosen = set(kept.indices[kept.mask].tolist())
    for axes, title, shown in zip(cells, ("18 boxes", "nms at 0.4"), (range(18), chosen), strict=True):
        for i in shown:
            x1, y1, x2, y2 = candidates[i].tolist()
            axes.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=BLUE, linewidth=1 + 2 * float(scores[i]))
            )
        axes.set(xlim=(-0.5, 4.4), ylim=(1.9, -0.5), title=title, aspect="equal")
        frame(axes)
    return figure


# --- the script --------------------------------------------------------------------------------------------------

FIGURES: tuple[Callable[[], Figure], ...] = (
    *(hard_mish, nl_relu, frelu, sam, triplet_attention, lambda_layer),
    *(norm_conv2d, add2d, slim_conv2d, pyconv2d, involution2d),
    *(concat_downsample2d, global_avg_pool2d, global_max_pool2d, blur_pool2d, spp, z_pool),
    *(dropout, drop_block2d, drop_path),
    *(cross_entropy, binary_cross_entropy, focal, poly, multilabel_cross_entropy, complement_cross_entropy),
    *(sigmoid_focal, kl_divergence, huber, embeddings, contrast, regions),
    *(class_balanced, mutual_channel, dice, ctc, box_losses, box_shapes, nms),
)


def main(folder: Path = FOLDER) -> None:
    """Draw all of them into a folder, each under its function's name."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(drawing.STYLE), torch.no_grad():
        for figure in FIGURES:
            save(figure(), folder / f"{figure.__name__}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
