"""Each row of `docs/deviations.md` on layers, losses, boxes, optimizers and models, in both libraries."""

import re
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from holofunc import losses, models, nn, optim, random
from holofunc.nn import functional
from holofunc.ops import boxes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pylocron compiles a torch.jit class when it is imported
    import holocron.models.classification as their_models
    import holocron.nn
    import holocron.optim
    from holocron.models.classification.resnet import ResNet18_Checkpoint
    from holocron.nn import functional as theirs
    from holocron.ops import boxes as their_boxes

PAGE = (Path(__file__).parents[1] / "docs/deviations.md").read_text()
CHECKS = {}
close = torch.testing.assert_close


def row(name):
    def add(check):
        CHECKS[name] = check
        return check

    return add


def draw(seed, *shape, **options):
    return random.normal(random.key(seed), shape, **options)


def refuses(call, error=RuntimeError, match=None):
    with pytest.raises(error, match=match):
        call()
    return True


def rows(*sections):
    for section in sections:
        table = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
        yield from re.findall(r"^\| ([\w`][^|]*?) \|", table, flags=re.M)


def test_every_row_is_checked():
    assert set(rows("Layers", "Losses", "Boxes", "Optimizers", "Models")) == set(CHECKS)


# --- layers ------------------------------------------------------------------------------------------------------

ONES, X = torch.ones(300, 1, 32, 32), draw(0, 2, 16, 8, 8)


def share(x):
    return (x == 0).float().mean().item()


@row("DropBlock: how much")
def _():
    layer = holocron.nn.DropBlock2d(0.1, 7).train()
    assert share(layer(ONES)) < 0.005
    assert share(functional.dropblock2d(ONES, 0.1, 7, key=random.key(0))) == pytest.approx(0.1, rel=0.1)
    assert share(functional.dropblock2d(ONES, 0.1 / 49, 7, key=random.key(0))) < 0.005


@row("DropBlock: even sizes")
def _():
    assert refuses(lambda: holocron.nn.DropBlock2d(0.5, 4).train()(ONES[:2]))
    assert share(functional.dropblock2d(ONES, 0.2, 4, key=random.key(0))) == pytest.approx(0.2, rel=0.05)


@row("DropBlock: channels")
def _():
    x, key = torch.ones(8, 4, 16, 16), random.key(0)
    shared = theirs.dropblock2d(x, 0.3, 3), functional.dropblock2d(x, 0.3, 3, key=key)
    assert all(torch.equal(y[:, 0] == 0, y[:, 3] == 0) for y in shared)
    own = functional.dropblock2d(x, 0.3, 3, key=key, per_channel=True)
    assert not torch.equal(own[:, 0] == 0, own[:, 3] == 0)


@row("NormConv2d, Add2d: gradient")
def _():
    x = X.clone().requires_grad_()
    for name, options in (("NormConv2d", {}), ("Add2d", {"normalize_slices": True})):
        layer = getattr(holocron.nn, name)(16, 8, 3, **options)
        assert refuses(lambda layer=layer: layer(x * 1).sum().backward(), match="inplace operation")
        (grad,) = torch.autograd.grad(getattr(nn, name)(16, 8, 3, **options)(x * 1).square().sum(), x)
        assert grad.abs().max() > 0


@row("NormConv2d, Add2d: groups")
def _():
    for name in ("NormConv2d", "Add2d"):
        assert refuses(lambda name=name: getattr(holocron.nn, name)(16, 8, 3, groups=2)(X))
        assert getattr(nn, name)(16, 8, 3, groups=2)(X).shape == (2, 8, 6, 6)


@row("NormConv2d: constant patches")
def _():
    x, weight = torch.full((1, 16, 6, 6), 7.3), draw(1, 8, 16, 3, 3)
    assert theirs.norm_conv2d(x.clone(), weight).abs().max() > 0.5
    assert functional.norm_conv2d(x, weight).abs().max() < 0.05


@row("Add2d: memory")
def _():
    def largest(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            function(X.clone().requires_grad_(), draw(1, 32, 16, 3, 3).requires_grad_())
        return max(sizes)

    patches = 2 * 36 * 16 * 9
    assert largest(theirs.add2d) == patches * 32
    assert largest(functional.add2d) == patches


@row("BlurPool2d: filter")
def _():
    assert holocron.nn.BlurPool2d(3).to("cpu") is None
    layer = nn.BlurPool2d(3).to(torch.float64)
    assert layer(X[:, :3].double()).dtype == torch.float64
    assert layer.state_dict() == {}


@row("PyConv2d: channels")
def _():
    assert holocron.nn.PyConv2d(16, 10, 3, 4, padding=1)(X).shape[1] == 8
    assert refuses(lambda: nn.PyConv2d(16, 10, 3, 4, padding=1), ValueError, "divisible by 4")


@row("Involution2d: sizes")
def _():
    options = {"padding": 1, "stride": 2}
    assert refuses(lambda: holocron.nn.Involution2d(16, 3, **options)(X[..., :7, :7]))
    assert nn.Involution2d(16, 3, **options)(X[..., :7, :7]).shape[2:] == (4, 4)


@row("NLReLU: inplace")
def _():
    x = X.clone().requires_grad_()
    assert refuses(lambda: holocron.nn.NLReLU(inplace=True)(x * 1).sum().backward())
    nn.NLReLU(inplace=True)(x * 1).sum().backward()


@row("global pooling: strides")
def _():
    x = X.transpose(2, 3)[..., ::2]
    for name in ("GlobalAvgPool2d", "GlobalMaxPool2d"):
        assert refuses(lambda name=name: getattr(holocron.nn, name)()(x))
        assert getattr(nn, name)()(x).shape == (2, 16, 1, 1)


@row("initialization")
def _():
    norm, linear = torch.nn.BatchNorm2d(3, affine=False), torch.nn.Linear(4, 4)
    assert refuses(lambda: holocron.nn.init.init_module(norm), AttributeError)
    before = linear.weight.clone()
    holocron.nn.init.init_module(linear)
    assert torch.equal(before, linear.weight)
    assert nn.init.kaiming(norm, random.key(0)) == {}
    assert set(nn.init.kaiming(linear, random.key(0))) == {"weight", "bias"}


# --- losses ------------------------------------------------------------------------------------------------------

LOGITS, LABELS, WEIGHT = draw(2, 6, 3), torch.tensor([0, 1, 2, 1, 1, 0]), torch.tensor([1.0, 2.0, 5.0])
DENSE, MAP = draw(3, 2, 3, 4, 5), torch.arange(40).remainder(3).view(2, 4, 5)
SOFT = draw(4, 6, 3).softmax(1)
IGNORING = torch.tensor([0, 1, -100, 1, 1, 0])
PAIRS = {
    losses.focal: theirs.focal_loss,
    losses.poly: theirs.poly_loss,
    losses.complement_cross_entropy: theirs.complement_cross_entropy,
}


@row("weighted mean")
def _():
    for ours, other in PAIRS.items():
        expected = other(LOGITS, LABELS, weight=WEIGHT)
        mean = ours(LOGITS, LABELS, weight=WEIGHT)
        assert abs(mean - expected) > 0.1
        close(mean, ours(LOGITS, LABELS, weight=WEIGHT, reduction="sum") / WEIGHT[LABELS].sum())
        if ours is not losses.complement_cross_entropy:  # there the weights also enter the complement, by column
            close(ours(LOGITS, LABELS, weight=WEIGHT, mean_over="samples"), expected)
    cross_entropy = torch.nn.functional.cross_entropy(LOGITS, LABELS, WEIGHT)
    close(losses.focal(LOGITS, LABELS, weight=WEIGHT, gamma=0.0), cross_entropy)


@row("reduction")
def _():
    there = (theirs.focal_loss, LABELS), (theirs.poly_loss, LABELS), (theirs.multilabel_cross_entropy, SOFT)
    for other, targets in there:
        assert other(LOGITS, targets, reduction="avg").shape == (6,)
    for ours in (*PAIRS, losses.multilabel_cross_entropy):
        assert refuses(lambda ours=ours: ours(LOGITS, LABELS, reduction="avg"), ValueError, "reduction")


@row("all ignored")
def _():
    nothing, logits = torch.full((6,), -100), LOGITS.clone().requires_grad_()
    assert theirs.focal_loss(LOGITS, nothing) == 0
    assert refuses(lambda: theirs.poly_loss(LOGITS, nothing))
    for ours in PAIRS:
        loss = ours(logits, nothing)
        assert loss == 0
        assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


@row("focal: gradient")
def _():
    logits, label = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    (grad,) = torch.autograd.grad(theirs.focal_loss(logits, label, gamma=0.5), logits)
    assert grad.isnan().any()
    (grad,) = torch.autograd.grad(losses.focal(logits, label, gamma=0.5), logits)
    assert grad.isfinite().all()


@row("focal: soft targets")
def _():
    assert refuses(lambda: theirs.focal_loss(LOGITS, SOFT))
    close(losses.focal(LOGITS, one_hot(LABELS, 3).float()), theirs.focal_loss(LOGITS, LABELS))


@row("poly: ignore_index")
def _():
    assert refuses(lambda: theirs.poly_loss(LOGITS, IGNORING, ignore_index=-100), match="out of bounds")
    kept = IGNORING != -100
    close(losses.poly(LOGITS, IGNORING), theirs.poly_loss(LOGITS[kept], LABELS[kept]))


@row("poly: soft targets")
def _():
    p, cross_entropy = LOGITS.softmax(1), losses.cross_entropy(LOGITS, SOFT)
    close(theirs.poly_loss(LOGITS, SOFT), cross_entropy + 2 * (1 - p**SOFT).sum(1).mean())
    close(losses.poly(LOGITS, SOFT), cross_entropy + 2 * (1 - (SOFT * p).sum(1)).mean())


@row("poly: dense weights")
def _():
    targets = DENSE.softmax(1)
    assert refuses(lambda: theirs.poly_loss(DENSE, targets, weight=WEIGHT))
    moved = losses.poly(DENSE.movedim(1, -1).flatten(0, 2), targets.movedim(1, -1).flatten(0, 2), weight=WEIGHT)
    close(losses.poly(DENSE, targets, weight=WEIGHT), moved)


@row("poly: none")
def _():
    assert theirs.poly_loss(DENSE, MAP, reduction="none").shape == (40,)
    close(losses.poly(DENSE, MAP, reduction="none").flatten(), theirs.poly_loss(DENSE, MAP, reduction="none"))


@row("complement: certain labels")
def _():
    close(losses.complement_cross_entropy(LOGITS, LABELS), theirs.complement_cross_entropy(LOGITS, LABELS))
    for logit in (30.0, 200.0):
        logits = torch.tensor([[logit, 0.0, 0.0]])
        assert not theirs.complement_cross_entropy(logits, LABELS[:1]).isfinite()
        assert losses.complement_cross_entropy(logits, LABELS[:1]).isfinite()


@row("complement: ignore_index")
def _():
    assert refuses(lambda: theirs.complement_cross_entropy(LOGITS, IGNORING), match="out of bounds")
    assert theirs.complement_cross_entropy(LOGITS, LABELS, ignore_index=2, reduction="none")[2] != 0
    kept = losses.complement_cross_entropy(LOGITS, LABELS, ignore_index=2, reduction="none")
    assert (kept == 0).tolist() == (LABELS == 2).tolist()


@row("multilabel: ignore_index")
def _():
    close(
        losses.multilabel_cross_entropy(LOGITS, SOFT, weight=torch.tensor([1.0, 0.0, 1.0]), reduction="none"),
        theirs.multilabel_cross_entropy(LOGITS, SOFT, ignore_index=1, reduction="none"),
    )
    assert losses.multilabel_cross_entropy(LOGITS, LABELS, ignore_index=1, reduction="none")[1] == 0


@row("mutual channel: diversity")
def _():
    maps, labels = draw(5, 2, 6, 5, 5), torch.arange(50).remainder(3).view(2, 5, 5)
    expected = theirs.mutual_channel_loss(maps, labels, training=False)
    close(losses.mutual_channel(maps, labels, alpha=1 / 25), expected)
    diversity = losses.mutual_channel(maps, labels, alpha=0.0) - losses.mutual_channel(maps, labels)
    assert 1 <= diversity <= 2


@row("mutual channel: whole images")
def _():
    maps, labels = draw(5, 2, 6, 5, 5), torch.tensor([0, 1])
    assert refuses(lambda: theirs.mutual_channel_loss(maps, labels), match="spatial targets")
    pooled = maps.unflatten(1, (3, 2)).amax(2).mean((2, 3))
    close(losses.mutual_channel(maps, labels, alpha=0.0), losses.cross_entropy(pooled, labels))


@row("dice: absent classes")
def _():
    perfect = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
    assert theirs.dice_loss(perfect, perfect) == pytest.approx(-2 / 3)
    for absent in ("exclude", "count"):
        assert losses.dice(perfect, perfect, activation="none", absent=absent) == 0


@row("dice: inputs")
def _():
    p, t = DENSE.softmax(1), one_hot(MAP, 3).movedim(-1, 1).float()
    assert refuses(lambda: theirs.dice_loss(p[..., 0, 0], t[..., 0, 0]), IndexError)
    assert losses.dice(LOGITS, LABELS).isfinite()
    for gamma in (0.5, 1.0, 2.0):
        pooled = (x.transpose(0, 1).flatten(1)[None] for x in (p, t))
        ours = losses.dice(*pooled, activation="none", squared=False, gamma=gamma)
        close(ours, theirs.dice_loss(p, t, gamma=gamma))


@row("class balance: weights")
def _():
    mine = torch.ones(3)
    holocron.nn.ClassBalancedWrapper(torch.nn.CrossEntropyLoss(weight=mine), torch.tensor([10.0, 5.0, 1.0]))
    assert mine[0] < 1
    wrapper = holocron.nn.ClassBalancedWrapper(torch.nn.CrossEntropyLoss(), torch.tensor([10.0, 0.0, 1.0]))
    assert wrapper.criterion.weight[1].isinf()
    balanced = losses.class_balanced(losses.cross_entropy, [10, 0, 1])
    each = balanced(torch.zeros(3, 3), torch.arange(3), reduction="none") / torch.tensor(3.0).log()
    assert each[1] == each[2]
    close(each.sum(), torch.tensor(3.0))


# --- boxes -------------------------------------------------------------------------------------------------------

A, B = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.1, 0.1, 1.6, 0.7]])


@row("boxes without area")
def _():
    point = torch.full((1, 4), 0.5)
    for name in ("box_giou", "diou_loss", "ciou_loss"):
        assert getattr(their_boxes, name)(point, point).isnan().all()
        gradient, value = torch.func.grad_and_value(lambda x, name=name: getattr(boxes, name)(x, x).sum())(point)
        assert value.isfinite()
        assert gradient.isfinite().all()


@row("float64")
def _():
    assert their_boxes.iou_penalty(A.double(), B.double()).dtype == torch.float32
    assert boxes.iou_penalty(A.double(), B.double()).dtype == torch.float64


@row("CIoU: gradient")
def _():
    def gradient(loss, **options):
        return torch.func.grad(lambda a: loss(a, B, **options).sum())(A)

    expected = torch.autograd.grad(their_boxes.ciou_loss(a := A.clone().requires_grad_(), B).sum(), a)[0]
    close(gradient(boxes.ciou_loss, detach_alpha=False), expected)
    assert (gradient(boxes.ciou_loss) - expected).abs().max() > 0.01


@row("boxes: vmap")
def _():
    many = A.expand(3, 1, 4), B.expand(3, 1, 4)
    for name in ("box_giou", "ciou_loss"):
        assert refuses(lambda name=name: torch.vmap(getattr(their_boxes, name))(*many), match="vmap")
        close(torch.vmap(getattr(boxes, name))(*many), getattr(boxes, name)(*many))


@row("matched boxes")
def _():
    a, b = A + torch.arange(3.0)[:, None] / 4, B.expand(3, 4)
    close(boxes.ciou_loss(a, b, paired=True), their_boxes.ciou_loss(a, b).diagonal())


@row("swapped corners")
def _():
    swapped = A[:, [2, 1, 0, 3]]
    assert refuses(lambda: their_boxes.box_giou(swapped, A), AssertionError)
    assert refuses(lambda: boxes.check_boxes(swapped), ValueError, "x1 <= x2")
    assert boxes.box_giou(swapped, A).isfinite()


# --- optimizers --------------------------------------------------------------------------------------------------

START = {"w": draw(6, 4, 3, dtype=torch.float64), "b": draw(7, 4, dtype=torch.float64)}
GRADS = [{n: draw(8 + i, *p.shape, dtype=torch.float64) for n, p in START.items()} for i in range(8)]


def ran(tx):
    params, state = START, tx.init(START)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return torch.cat([p.flatten() for p in params.values()])


def ran_there(make):
    params = {n: torch.nn.Parameter(p.clone()) for n, p in START.items()}
    optimizer = make(list(params.values()))
    for grads in GRADS:
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params.values()])


def only_there(name, there, options, **authors):
    """The authors' rule gives another trajectory, that of `optim.holocron`, with the options of the page, Holocron's."""
    expected = ran_there(lambda p: there(p, 0.1, weight_decay=0.05))
    ours = getattr(optim.holocron, name)
    other = ours(0.1, weight_decay=0.05, **authors) if authors else getattr(optim, name)(0.1, weight_decay=0.05)
    assert (ran(other) - expected).abs().max() > 1e-4
    close(ran(ours(0.1, weight_decay=0.05, **options)), expected, rtol=0, atol=1e-12)
    close(ran(ours(0.1, weight_decay=0.05)), expected, rtol=0, atol=1e-12)


def options_of(name):
    """What the last column of a row says."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return eval(f"dict({line.rstrip(' |').rsplit('| ', 1)[1].strip('`')})")


@row("Adan: previous gradient")
def _():
    options = options_of("Adan: previous gradient")
    only_there("adan", holocron.optim.Adan, options, prev="grad")


@row("Adan: weight decay")
def _():
    options = options_of("Adan: weight decay")
    only_there("adan", holocron.optim.Adan, options, l2_too=False)


@row("LARS")
def _():
    only_there("lars", holocron.optim.LARS, options_of("LARS"))
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    holocron.optim.LARS([p], 0.1, weight_decay=0.5).step()
    assert p.grad.tolist() == [1.5] * 3


for name in ("LAMB", "AdamP", "AdaBelief", "TAdam", "AdEMAMix"):

    @row(name)
    def _(name=name):
        only_there(name.lower(), getattr(holocron.optim, name), options_of(name))


@row("Lookahead, Scout: state")
def _():
    for name in ("Lookahead", "Scout"):
        inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
        assert refuses(getattr(holocron.optim.wrapper, name)(inner).state_dict, AttributeError)
        state = getattr(optim, name.lower())(optim.sgd(0.1)).init(START)
        assert torch.equal(state.slow["w"], START["w"])


@row("Scout: constant updates")
def _():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = holocron.optim.wrapper.Scout(torch.optim.SGD([p], 0.125))
    ours = {
        compat: ({"p": torch.ones(2)}, optim.holocron.scout(optim.sgd(0.125), compat=compat))
        for compat in (True, False)
    }
    states = {compat: tx.init(params) for compat, (params, tx) in ours.items()}
    for _ in range(12):
        p.grad = torch.ones(2)
        optimizer.step()
        for compat, (params, tx) in ours.items():
            updates, states[compat] = tx.update({"p": torch.ones(2)}, states[compat], params)
            ours[compat] = optim.apply_updates(params, updates), tx
    assert p.tolist() == [1.0, 1.0]
    close(ours[True][0]["p"], torch.ones(2))
    assert ours[False][0]["p"].max() < 0.5


# --- models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """No network, and a cache of our own."""

    def refuse(*_, **__):
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(torch.hub, "_hub_dir", str(tmp_path_factory.mktemp("hub")))
        yield


@row("`pretrained=True`")
def _():
    assert refuses(lambda: their_models.resnet18(pretrained=True), OSError)  # it would load
    for name in ("resnet34", "resnet50d", "resnext50_32x4d", *(f"mobileone_s{i}" for i in range(4))):
        with torch.device("meta"):
            getattr(their_models, name)(pretrained=True)  # these do not even try
        assert refuses(lambda name=name: getattr(models, name)(weights="DEFAULT"), OSError)


@row("`checkpoint=`")
def _():
    their_models.resnet18(checkpoint=ResNet18_Checkpoint.DEFAULT)
    assert refuses(lambda: their_models.resnet18(checkpoint=ResNet18_Checkpoint.DEFAULT.value), OSError)
    for weights in ("IMAGENETTE", models.weights.checkpoints("resnet18")[0]):
        assert refuses(lambda weights=weights: models.resnet18(weights=weights), OSError)


def published():
    """A file of weights, and Holocron's record of it with a wrong hash."""
    path, record = Path(torch.hub.get_dir(), "w.pth"), ResNet18_Checkpoint.DEFAULT.value
    torch.save(their_models.resnet18().state_dict(), path)
    return path, replace(record, meta=replace(record.meta, url=path.as_uri(), sha256="0" * 64))


@row("checksums")
def _():
    path, record = published()
    loaded = their_models.resnet18(checkpoint=record).state_dict()
    assert torch.equal(loaded["head.bias"], torch.load(path)["head.bias"])
    ours = models.weights.Weights("resnet18", "mine", str(path), sha256="0" * 64)
    assert refuses(lambda: models.resnet18(weights=ours), OSError, "its sha256 is")


@row("another number of classes")
def _():
    path, record = published()
    assert refuses(lambda: their_models.resnet18(checkpoint=record, num_classes=3), match="size mismatch")
    assert refuses(lambda: models.resnet18(weights=path, num_classes=3), ValueError, "new_head=True")
    params, _ = models.resnet18(weights=path, num_classes=3, new_head=True).init(random.key(0))
    assert torch.equal(params["features.0.weight"], torch.load(path)["features.0.weight"])


@row("ResNet-152, SKNet-152")
def _():
    for name in ("resnet152", "sknet152"):
        with torch.device("meta"):
            many = sum(p.numel() for p in getattr(their_models, name)().parameters())
        build = getattr(models, name)
        sizes = [
            sum(p.numel() for p in build(**options).skeleton.parameters())
            for options in ({}, {"num_blocks": [3, 8, 86, 3]})
        ]
        assert sizes[1] == many > 1.8 * sizes[0]


@row("PyConv ResNets")
def _():
    image = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        theirs = their_models.pyconv_resnet50().eval()
    assert theirs.features(image).shape[2:] == (14, 14)
    model = models.pyconv_resnet50()
    assert model.skeleton.features(image).shape[2:] == (7, 7)
    assert [p.shape for p in model.skeleton.parameters()] == [p.shape for p in theirs.parameters()]


@row("`zero_init_residual`")
def _():
    assert refuses(lambda: their_models.resnet18(zero_init_residual=True), AttributeError)
    params, _ = models.resnet18(zero_init_residual=True).init(random.key(0))
    zeros = [name for name, value in params.items() if name.endswith("weight") and not value.any()]
    assert len(zeros) == 8


@row("merging branches")
def _():
    theirs = their_models.repvgg_a0().train()
    theirs.reparametrize()
    assert theirs.training
    model = models.repvgg_a0()
    deployed, params, buffers = models.reparametrize(model, *(state := model.init(random.key(0))))
    x = draw(9, 2, 3, 32, 32)
    close(deployed.apply(params, buffers, x)[0], model.apply(*state, x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CHECKS)
def test_row(name):
    CHECKS[name]()
