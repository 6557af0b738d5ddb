"""The law of devices: whatever its arguments are on, a function makes nothing elsewhere, and reads no value.

Everything runs with all of its arguments on the meta device, which has no values: a constant made on the CPU does not
mix with them, and a read of a value raises.
"""

from functools import partial

import pytest
import torch

from holofunc import lift, losses, metrics, nn, ops, random, tree

META = torch.device("meta")
N, K = 4, 3
KEY = random.key(0).to(META)


def real(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=META)


def whole(*shape):
    return real(*shape, dtype=torch.int64)


def truth(*shape):
    return real(*shape, dtype=torch.bool)


def on_meta(out, some=True):
    """Whether every tensor of a tree is on the meta device, and there is one."""
    found = [x for x in tree.leaves(out) if isinstance(x, torch.Tensor)]
    assert len(found) > 0 or not some
    assert {x.device for x in found} <= {META}


# --- losses ------------------------------------------------------------------------------------------------------

CLASSES = {
    name: (getattr(losses, name), [(whole(N), {}), (real(N, K), {}), (whole(N), {"weight": [1.0, 2.0, 3.0]})])
    for name in (
        *("cross_entropy", "focal", "poly", "complement_cross_entropy", "multilabel_cross_entropy"),
        *("binary_cross_entropy", "sigmoid_focal", "dice", "tversky", "generalized_dice", "lovasz"),
    )
}
CASES = {
    **CLASSES,
    "class_balanced": (losses.class_balanced(losses.focal, [5, 1, 2]), [(whole(N), {}), (whole(N), {"weight": [1, 2, 3]})]),
    "kl_divergence": (losses.kl_divergence, [(real(N, K), {"temperature": 2.0, "weight": [1.0, 2.0, 3.0]})]),
    "huber": (losses.huber, [(real(N, K), {"delta": 0.5}), (real(N, K), {"weight": 0.5})]),
    "smooth_l1": (losses.smooth_l1, [(real(N, K), {"beta": 0.5}), (real(N, K), {"weight": real(N, 1)})]),
    "cosine": (losses.cosine, [(real(N, K), {})]),
    "nt_xent": (losses.nt_xent, [(real(N, K), {})]),
    "supervised_contrastive": (losses.supervised_contrastive, [(whole(N), {})]),
    "triplet": (losses.triplet, [(real(N, K), {"negatives": real(N, K)})]),
}  # fmt: skip
READ_VALUES = {"check_labels", "check_boxes", "check_targets", "check_lengths"}
"""Checks where data enters, on the host; that they read is said where they are described."""


def test_every_loss_is_there():
    assert set(losses.__all__) == {*CASES, "ctc", "mutual_channel"} | (READ_VALUES & set(losses.__all__))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_losses(name, reduction):
    loss, cases = CASES[name]
    for targets, options in cases:
        value = loss(real(N, K), targets, reduction=reduction, **options)
        on_meta(value)
        grad = torch.func.grad(lambda x, t=targets, o=options: loss(x, t, reduction="mean", **o))(real(N, K))
        on_meta(grad)


def test_losses_of_other_shapes():
    on_meta(losses.cross_entropy(real(N, K, 2, 2).half(), whole(N, 2, 2), label_smoothing=0.1))
    on_meta(losses.binary_cross_entropy(real(N, K), real(N, K), pos_weight=[1, 2, 3]))
    on_meta(losses.mutual_channel(real(N, 2 * K, 4, 4), whole(N), key=KEY))
    on_meta(losses.ctc(real(5, N, K), whole(N, 2)))
    on_meta(losses.ctc(real(5, N, K), whole(N, 2), input_lengths=whole(N), target_lengths=whole(N)))


# --- boxes, texts and kernels ------------------------------------------------------------------------------------

PAIRS = ("box_iou", "box_giou", "box_diou", "box_ciou", "iou_penalty", "aspect_ratio_consistency", "giou_loss",
         "diou_loss", "ciou_loss")  # fmt: skip
BOXES = real(5, 4)
CONV, BATCH_NORM = {"weight": real(6, 4, 3, 3)}, {n: real(6) for n in ("weight", "bias", "running_mean", "running_var")}
OPERATORS = {
    **{f"boxes.{n}": partial(getattr(ops.boxes, n), BOXES, real(3, 4)) for n in PAIRS},
    **{f"boxes.{n}, paired": partial(getattr(ops.boxes, n), BOXES, BOXES, paired=True) for n in PAIRS},
    "boxes.aspect_ratio": lambda: ops.boxes.aspect_ratio(BOXES),
    "boxes.nms": lambda: ops.boxes.nms(BOXES, real(5), 0.5, max_detections=3),
    "boxes.nms, labels": lambda: ops.boxes.nms(BOXES, real(5), 0.5, max_detections=3, labels=whole(5)),
    "assignment.assign": lambda: ops.assignment.assign(real(2, 4, 3), truth(2, 3)),
    "ctc.greedy_decode": lambda: ops.ctc.greedy_decode(real(5, N, K), whole(N)),
    "ctc.prefix_beam_decode": lambda: ops.ctc.prefix_beam_decode(real(5, N, K), whole(N), beam_width=2),
    "ctc.edit_distance": lambda: ops.ctc.edit_distance(whole(N, 3), whole(N, 2)),
    "matching.assign": lambda: ops.matching.assign(real(3, 2), whole(3, 2), truth(3)),
    "matching.occupied": lambda: ops.matching.occupied(whole(3), truth(3), 5),
    "reparam.fuse_conv_bn": lambda: ops.reparam.fuse_conv_bn(CONV, BATCH_NORM),
    "reparam.identity_conv": lambda: ops.reparam.identity_conv(6, device=META),
    "reparam.pad_kernel": lambda: ops.reparam.pad_kernel(real(6, 4, 1, 1), (3, 3)),
    "reparam.merge_branches": lambda: ops.reparam.merge_branches([CONV, {"weight": real(6, 4, 1, 1)}]),
}
NO_FUNCTIONS = {"Kept", "Assignment", "PADDING", "Decoded", "Detections", "Targets", "check_layout"}
OF_ANY_SIZE = {"dynamic_nms"}
"""What the size of the result is depends on values."""


def test_every_operator_is_there():
    public = {f"{room}.{name}" for room in ops.__all__ for name in getattr(ops, room).__all__}
    left = {path for path in public if path.split(".")[1] in NO_FUNCTIONS | OF_ANY_SIZE | READ_VALUES}
    assert public == {name.partition(",")[0] for name in OPERATORS} | left


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    on_meta(OPERATORS[name]())


# --- layers ------------------------------------------------------------------------------------------------------

LAYERS = {
    "HardMish": nn.HardMish,
    "NLReLU": nn.NLReLU,
    "FReLU": partial(nn.FReLU, 8),
    "SAM": partial(nn.SAM, 8),
    "TripletAttention": nn.TripletAttention,
    "NormConv2d": partial(nn.NormConv2d, 8, 4, 3, padding=1),
    "Add2d": partial(nn.Add2d, 8, 4, 3, padding=1, normalize_slices=True),
    "SlimConv2d": partial(nn.SlimConv2d, 8, 3, padding=1),
    "PyConv2d": partial(nn.PyConv2d, 8, 8, 3, 3, padding=1),
    "Involution2d": partial(nn.Involution2d, 8, 3, 1, groups=2, reduction_ratio=2),
    "LambdaLayer": partial(nn.LambdaLayer, 8, 8, 4, r=3, num_heads=2, dim_u=2),
    "DropBlock2d": partial(nn.DropBlock2d, 0.3, 3),
    "Dropout": partial(nn.Dropout, 0.4),
    "DropPath": partial(nn.DropPath, 0.4),
    "ConcatDownsample2d": partial(nn.ConcatDownsample2d, 2),
    "GlobalAvgPool2d": nn.GlobalAvgPool2d,
    "GlobalMaxPool2d": nn.GlobalMaxPool2d,
    "BlurPool2d": partial(nn.BlurPool2d, 8),
    "SPP": partial(nn.SPP, [5, 3]),
    "ZPool": nn.ZPool,
}


def test_every_layer_is_there():
    assert {*LAYERS, "functional", "init"} == set(nn.__all__)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    model = lift(LAYERS[name])
    params, buffers = model.init(random.key(0), device=META)
    on_meta((params, buffers), some=False)
    for train in (False, True):
        out, renewed = model.apply(params, buffers, real(2, 8, 6, 6), train=train, key=KEY)
        on_meta((out, renewed))


# --- metrics -----------------------------------------------------------------------------------------------------

SCORES, LABELS = real(N, K), whole(N)
IMAGES = real(2, 3, 12, 12)
FOUND = (real(2, 5, 4), real(2, 5), whole(2, 5), truth(2, 5))
TRUE = (real(2, 3, 4), whole(2, 3), truth(2, 3))
MEASURED = {
    **{
        name: (partial(getattr(metrics, name), K), SCORES, LABELS)
        for name in (
            *("precision", "recall", "f_beta", "iou", "specificity", "hamming", "auroc", "average_precision"),
            *("class_scores", "kappa", "matthews", "calibration_error", "confusion"),
        )
    },
    **{name: (getattr(metrics, name), real(N, 2), real(N, 2)) for name in ("mse", "mae", "r2", "pearson", "spearman")},
    **{name: (getattr(metrics, name), real(N), None) for name in ("mean", "sum", "min", "max", "collect")},
    "accuracy": (partial(metrics.accuracy, (1, 2)), SCORES, LABELS),
    "binary_accuracy": (metrics.binary_accuracy, SCORES, whole(N, K)),
    "combine": (lambda: metrics.combine(top=metrics.accuracy(), f=metrics.f_beta(K)), SCORES, LABELS),
    "psnr": (metrics.psnr, IMAGES, IMAGES),
    "ssim": (partial(metrics.ssim, window=5), IMAGES, IMAGES),
    "segmentation": (partial(metrics.segmentation, K), real(N, K, 2, 2), whole(N, 2, 2)),
    "detection_errors": (metrics.detection_errors, FOUND, TRUE),
    "coco": (partial(metrics.coco, K), FOUND, TRUE),
    "char_error_rate": (metrics.char_error_rate, whole(N, 5), whole(N, 3)),
    "word_error_rate": (partial(metrics.word_error_rate, 1), whole(N, 5), whole(N, 3)),
}
NO_METRICS = {"Average", "Metric", "Rows", "available", "confusion_scores", "from_torchmetrics", "get"}
COMPUTED_ON_HOST = {"coco", "collect"}
"""Their states have a row for everything seen, as many as there were: what is computed of them reads values."""


def test_every_metric_is_there():
    assert set(metrics.__all__) == set(MEASURED) | NO_METRICS


@pytest.mark.parametrize("name", MEASURED)
def test_metrics(name):
    build, outputs, targets = MEASURED[name]
    metric = build()
    weights = real(len(tree.leaves(outputs)[0]))
    first = metric.update(metric.init(device=META), outputs, targets)
    second = metric.update(metric.init(device=META), outputs, targets, weights=weights)
    state = metric.merge(first, second)
    on_meta(state)
    if name not in COMPUTED_ON_HOST:
        on_meta(metric.compute(state))
