"""Detectors: losses by hand-made numbers, laws of losses and decoding, options, bad input."""

import math

import pytest
import torch

from holofunc import jit, models, optim, random, train
from holofunc.models import Targets
from holofunc.models.yolo1 import YOLOv1Head
from holofunc.models.yolo2 import YOLOv2Head
from holofunc.models.yolo4 import YOLOv4Head

SMALL = {
    "yolov1": {
        "layout": [(8,), (8, 16), (16, 32), (32, 32)], "stem_channels": 8, "head_channels": 16,
        "head_hidden_nodes": 16, "image_size": 128,
    },
    "yolov2": {"layout": [(8, 0), (16, 0), (16, 0), (32, 0), (32, 0)], "stem_channels": 8, "head_channels": 16},
    "yolov4": {"layout": [(8, 1), (8, 1), (16, 1), (16, 1), (16, 1)], "stem_channels": 8},
}  # fmt: skip
TERMS = ("obj_loss", "noobj_loss", "bbox_loss", "clf_loss")


def small(name, **options):
    return models.create(name, num_classes=3, **SMALL[name], **options)


def outputs(name, images=2, dtype=torch.float64, seed=0):
    """Raw outputs as drawn, not computed, so that boxes are all over the image."""
    draw = lambda *shape: random.normal(random.key(seed + len(shape)), shape, dtype=dtype)  # noqa: E731
    if name == "yolov1":
        return draw(images, 2 * 2 * (10 + 3))
    if name == "yolov2":
        return draw(images, 5 * 8, 4, 4)
    return tuple(
        random.normal(random.key(seed + side), (images, 3 * 8, side, side), dtype=dtype) for side in (16, 8, 4)
    )


def some_targets(images=2, rows=4, dtype=torch.float64, seed=7):
    low = random.uniform(random.key(seed), (images, rows, 2), high=0.6, dtype=dtype)
    size = random.uniform(random.key(seed + 1), (images, rows, 2), low=0.05, high=0.4, dtype=dtype)
    labels = random.randint(random.key(seed + 2), (images, rows), 0, 3)
    return Targets(torch.cat([low, low + size], -1), labels, torch.ones(images, rows, dtype=torch.bool))


def of(*boxes, labels=None):
    """Targets of one image."""
    rows = torch.tensor([boxes], dtype=torch.float64).reshape(1, -1, 4)
    labels = torch.zeros(1, len(boxes), dtype=torch.int64) if labels is None else torch.tensor([labels])
    return Targets(rows, labels, torch.ones(1, len(boxes), dtype=torch.bool))


def each(fn, tree):
    return tuple(fn(x) for x in tree) if isinstance(tree, tuple) else fn(tree)


def total(model, out, targets, **options):
    return sum(model.loss(out, targets, **options).values())


# --- numbers -----------------------------------------------------------------------------------------------------

V1 = YOLOv1Head(num_classes=2, num_anchors=2, side=2)
V2 = YOLOv2Head(num_classes=2, anchors=((0.5, 0.5), (0.25, 0.25)))
HALF = math.log(2)


def logit(p):
    return math.log(p / (1 - p))


def v1_zeros():
    return torch.zeros(1, 4 * 12, dtype=torch.float64)


def v2_zeros():
    return torch.zeros(1, 2 * 7, 2, 2, dtype=torch.float64)


def values(head, out, targets):
    return {n.removesuffix("_loss"): float(v[0]) for n, v in head.losses(out, targets).items()}


def test_yolov2_of_one_box():
    found = values(V2, v2_zeros(), of([0.05, 0.05, 0.45, 0.45]))
    iou = 0.4**2 / 0.5**2  # with the anchor of 0.5 in the middle of the first cell
    assert found["obj"] == pytest.approx((0.5 - iou) ** 2)
    assert found["noobj"] == pytest.approx(0.5 * 7 * 0.25)  # seven slots of eight, at 0.5 each
    assert found["bbox"] == pytest.approx(5 * (2 - 0.16) * 2 * math.log(0.4 / 0.5) ** 2)
    assert found["clf"] == pytest.approx(HALF)  # of one anchor: Holocron counts all of them


def test_yolov1_of_one_box():
    out = v1_zeros()
    out[0, 2:4] = logit(0.2)  # the first box of the first cell is smaller than the second
    found = values(V1, out, of([0.05, 0.05, 0.45, 0.45]))
    iou = 0.4**2 / 0.5**2  # the second box, 0.5 wide, overlaps most
    assert found["obj"] == pytest.approx((0.5 - iou) ** 2)
    assert found["noobj"] == pytest.approx(0.5 * 7 * 0.25)
    assert found["bbox"] == pytest.approx(5 * 2 * (math.sqrt(0.5) - math.sqrt(0.4)) ** 2)
    assert found["clf"] == pytest.approx(0.5**2 + 0.5**2)


def test_yolov4_of_one_box():
    grids = (((0.25, 0.25),), ((0.5, 0.5),), ((1.0, 1.0),))
    head = YOLOv4Head(num_classes=2, anchors=grids, stretch=(1.0, 1.0, 1.0), iou_threshold=0.3)
    out = tuple(torch.zeros(1, 7, side, side, dtype=torch.float64) for side in (4, 2, 1))
    found = values(head, out, of([0.0, 0.0, 0.5, 0.5]))  # fits the second anchor, and no other by more than 0.25
    assert found["obj"] == pytest.approx(HALF)
    assert found["noobj"] == pytest.approx((16 + 4 + 1 - 1) * HALF)
    assert found["bbox"] == pytest.approx(0, abs=1e-12)
    assert found["clf"] == pytest.approx(2 * HALF)
    more = YOLOv4Head(num_classes=2, anchors=grids, stretch=(1.0, 1.0, 1.0), iou_threshold=0.2)
    found = values(more, out, of([0.0, 0.0, 0.5, 0.5]))  # now all three answer for it
    assert found["obj"] == pytest.approx(3 * HALF)
    assert found["noobj"] == pytest.approx((16 + 4 + 1 - 3) * HALF)
    assert found["clf"] == pytest.approx(6 * HALF)
    assert found["bbox"] > 0


def test_yolov4_options_of_its_targets():
    grids = (((0.25, 0.25),), ((0.5, 0.5),), ((1.0, 1.0),))
    out = tuple(torch.zeros(1, 7, side, side, dtype=torch.float64) for side in (4, 2, 1))
    out[1][0, 4] = 2.0
    out[1][0, 5] = 1.0
    options = {"num_classes": 2, "anchors": grids, "stretch": (1.0, 1.0, 1.0), "iou_threshold": 0.4}
    targets = of([0.0, 0.0, 0.4, 0.5])  # fits the second anchor by 0.8, the others by 0.3 and less
    plain = values(YOLOv4Head(**options), out, targets)
    mixed = values(YOLOv4Head(**options, label_smoothing=0.2, iou_share=1.0), out, targets)
    assert plain["obj"] == pytest.approx(math.log1p(math.exp(-2)))
    assert mixed["obj"] == pytest.approx(math.log1p(math.exp(2)) - 2 * 0.8)  # the overlap is 0.2 / 0.25
    assert plain["clf"] == pytest.approx(math.log1p(math.exp(-1)) + HALF)
    assert mixed["clf"] == pytest.approx(math.log1p(math.exp(1)) - 0.9 + HALF)


@pytest.mark.parametrize("name", SMALL)
def test_only_the_slots_that_answer_learn_a_class(name):
    model, out, targets = small(name), outputs(name, 1), some_targets(1, 1)
    gradient = torch.func.grad(lambda out: model.loss(out, targets)["clf_loss"])(out)
    if name == "yolov2":
        per_slot = gradient.unflatten(1, (5, 8))[:, :, 5:].abs().sum(2)
        assert int((per_slot > 0).sum()) == 1
    touched = sum(int((x != 0).sum()) for x in (gradient if isinstance(gradient, tuple) else (gradient,)))
    assert touched % 3 == 0
    assert touched == 3 or (name == "yolov4" and touched <= 27)


@pytest.mark.parametrize("name", SMALL)
def test_every_slot_answers_for_a_box_or_says_that_none_is_there(name):
    model = small(name, **({} if name == "yolov1" else {"ignore_iou": 1.0}))
    out, targets = outputs(name), some_targets()
    touched = []
    for term in ("obj_loss", "noobj_loss"):
        gradient = torch.func.grad(lambda out, term=term: model.loss(out, targets)[term])(out)
        parts = gradient if isinstance(gradient, tuple) else (gradient,)
        slots = [x.unflatten(1, (-1, 13 if name == "yolov1" else 8)).flatten(0, 1) for x in parts]
        places = [4, 9] if name == "yolov1" else [4]
        touched.append(torch.cat([x[:, places].flatten() != 0 for x in slots]))
    assert touched[0].any()
    assert torch.equal(touched[0], ~touched[1])


@pytest.mark.parametrize("name", ["yolov1", "yolov2"])
def test_overlaps_are_constants(name):
    """Objectness learns the overlap; boxes learn nothing from objectness."""
    model, out, targets = small(name), outputs(name), some_targets()
    gradient = torch.func.grad(lambda out: model.loss(out, targets)["obj_loss"])(out)
    slots = gradient.unflatten(1, (5, 8)).movedim(2, -1) if name == "yolov2" else gradient.unflatten(1, (4, 13))
    boxes = slots[..., :4] if name == "yolov2" else slots[..., :10].unflatten(-1, (2, 5))[..., :4]
    assert gradient.any()
    assert not boxes.any()


@pytest.mark.parametrize(("head", "out"), [(V1, v1_zeros()), (V2, v2_zeros())], ids=["yolov1", "yolov2"])
def test_errors_are_those_to_a_boxs_own_true_box(head, out):
    """With two boxes in two cells, the terms of boxes are sums; Holocron compares every size with all."""
    first, second = [0.05, 0.05, 0.45, 0.45], [0.55, 0.6, 0.75, 0.8]
    both = values(head, out, of(first, second))
    apart = [values(head, out, of(box)) for box in (first, second)]
    for term in ("obj", "bbox", "clf"):
        assert both[term] == pytest.approx(sum(one[term] for one in apart)), term


@pytest.mark.parametrize(("head", "out"), [(V1, v1_zeros()), (V2, v2_zeros())], ids=["yolov1", "yolov2"])
def test_a_centre_at_the_border_lies_in_the_last_cell(head, out):
    found = values(head, out, of([1.0, 1.0, 1.0, 1.0]))
    assert all(math.isfinite(v) for v in found.values())
    assert found["obj"] == pytest.approx(0.25)  # a box without area overlaps nothing
    at_border = head.losses(out, of([1.0, 1.0, 1.0, 1.0]))["bbox_loss"]
    assert float(at_border[0]) >= 5 * 2 * 0.25  # half a cell away in both directions


def test_two_boxes_in_one_cell_take_two_slots():
    first, second = [0.0, 0.0, 0.5, 0.5], [0.05, 0.05, 0.45, 0.45]  # both fit the larger anchor better
    found = values(V2, v2_zeros(), of(first, second, labels=[0, 1]))
    assert found["obj"] == pytest.approx((0.5 - 1) ** 2 + (0.5 - 0.25**2 / 0.4**2) ** 2)
    assert found["bbox"] == pytest.approx(5 * (2 - 0.16) * 2 * math.log(0.4 / 0.25) ** 2)
    assert found["noobj"] == pytest.approx(0.5 * 6 * 0.25)
    assert found["clf"] == pytest.approx(2 * HALF)
    turned = values(V2, v2_zeros(), of(second, first, labels=[1, 0]))
    assert turned == pytest.approx(found)
    crowded = values(V2, v2_zeros(), of(first, second, second))  # a cell has as many slots as anchors
    assert crowded["obj"] == pytest.approx(found["obj"])


def test_a_cell_of_two_boxes_learns_the_mean_of_their_classes():
    out = v1_zeros().requires_grad_()
    boxes = [0.0, 0.0, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4]
    of_one = V1.losses(out, of(boxes[0], labels=[0]))["clf_loss"]
    of_two = V1.losses(out, of(*boxes, labels=[0, 1]))["clf_loss"]
    assert of_two.item() == pytest.approx(of_one.item())
    assert not torch.autograd.grad(of_two.sum(), out)[0].any()  # half and half is what it says already


def test_square_roots_have_derivatives_at_zero():
    out = v1_zeros()
    out[0, 2:4] = out[0, 7:9] = -800.0  # a sigmoid that is 0
    gradient = torch.func.grad(lambda out: V1.losses(out, of([0.1, 0.1, 0.4, 0.4]))["bbox_loss"][0])(out)
    assert gradient.isfinite().all()


def test_slots_that_overlap_need_not_say_no():
    out = v2_zeros()
    out[0, 9:11, 0, 0] = math.log(2)  # the second anchor's box is as large as the first's: both overlap by 0.64
    targets = of([0.05, 0.05, 0.45, 0.45])
    assert values(V2, out, targets)["noobj"] == pytest.approx(0.5 * 6 * 0.25)
    all_slots = YOLOv2Head(num_classes=2, anchors=V2.anchors, ignore_iou=1.0)
    assert values(all_slots, out, targets)["noobj"] == pytest.approx(0.5 * 7 * 0.25)


@pytest.mark.parametrize("name", SMALL)
def test_lambdas_scale_their_terms(name):
    out, targets = outputs(name), some_targets()
    lambdas = {"lambda_obj": 2.0, "lambda_noobj": 3.0, "lambda_coords": 0.5, "lambda_class": 0.0}
    found = small(name, **lambdas).loss(out, targets)
    plain = small(name, **dict.fromkeys(lambdas, 1.0)).loss(out, targets)
    for term, value in zip(TERMS, lambdas.values(), strict=True):
        torch.testing.assert_close(found[term], value * plain[term])


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_reductions_are_over_images(name):
    model, out, targets = small(name), outputs(name, 3), some_targets(3)
    each_image = model.loss(out, targets, reduction="none")
    assert tuple(each_image) == TERMS
    for term, value in each_image.items():
        assert value.shape == (3,)
        torch.testing.assert_close(model.loss(out, targets)[term], value.mean())
        torch.testing.assert_close(model.loss(out, targets, reduction="sum")[term], value.sum())


@pytest.mark.parametrize("name", SMALL)
def test_padding_and_order_do_not_matter(name):
    model, out, targets = small(name), outputs(name, 3), some_targets(3, 5)
    expected = model.loss(out, targets, reduction="none")
    rubbish = Targets(torch.full((3, 2, 4), torch.nan), torch.full((3, 2), 99), torch.zeros(3, 2, dtype=torch.bool))
    padded = Targets(*(torch.cat(pair, 1) for pair in zip(rubbish, targets, strict=True)))
    shuffled = Targets(*(part[:, [3, 0, 4, 1, 2]] for part in targets))
    turned = model.loss(each(lambda x: x.flip(0), out), Targets(*(x.flip(0) for x in targets)), reduction="none")
    for term in TERMS:
        torch.testing.assert_close(model.loss(out, padded, reduction="none")[term], expected[term])
        torch.testing.assert_close(model.loss(out, shuffled, reduction="none")[term], expected[term])
        torch.testing.assert_close(turned[term].flip(0), expected[term])
    gradient = torch.func.grad(lambda out: total(model, out, padded))(out)
    same = torch.func.grad(lambda out: total(model, out, targets))(out)
    torch.testing.assert_close(gradient, same)


@pytest.mark.parametrize("name", SMALL)
def test_images_without_boxes_learn_that_there_are_none(name):
    model, out, targets = small(name), outputs(name), some_targets()
    empty = targets._replace(mask=torch.zeros_like(targets.mask))
    found = model.loss(out, empty)
    assert [term for term in TERMS if found[term] != 0] == ["noobj_loss"]
    none = Targets(*(part[:, :0] for part in targets))
    for term in TERMS:
        torch.testing.assert_close(model.loss(out, none)[term], found[term])


@pytest.mark.parametrize("name", SMALL)
def test_images_are_mapped_one_by_one(name):
    model, out, targets = small(name), outputs(name, 3), some_targets(3)

    def one(out, targets):
        return total(model, each(lambda x: x[None], out), Targets(*(x[None] for x in targets)))

    torch.testing.assert_close(torch.vmap(one)(out, targets), total(model, out, targets, reduction="none"))
    mapped = torch.vmap(torch.func.grad(one))(out, targets)
    torch.testing.assert_close(mapped, torch.func.grad(lambda out: total(model, out, targets, reduction="sum"))(out))
    found = model.decode(out, max_detections=6)
    single = torch.vmap(lambda out: model.decode(each(lambda x: x[None], out), max_detections=6))(out)
    for got, wanted in zip(single, found, strict=True):
        torch.testing.assert_close(got[:, 0], wanted)


@pytest.mark.parametrize("name", SMALL)
def test_tangents_are_finite_differences(name):
    model, out, targets = small(name), outputs(name, 1), some_targets(1)
    step = 1e-6
    for term in TERMS:
        direction = outputs(name, 1, seed=50)
        if term == "obj_loss" and name != "yolov4":  # the overlap in it is a constant: move objectness alone
            slot = torch.zeros(13 if name == "yolov1" else 8, dtype=torch.float64)
            slot[[4, 9] if name == "yolov1" else 4] = 1
            direction = direction * (slot.repeat(4) if name == "yolov1" else slot.repeat(5)[:, None, None])
        loss = lambda out, term=term: model.loss(out, targets)[term]  # noqa: E731
        _, slope = torch.func.jvp(loss, (out,), (direction,))
        moved = [
            loss(tuple(x + sign * step * d for x, d in zip(out, direction, strict=True)))
            if isinstance(out, tuple)
            else loss(out + sign * step * direction)
            for sign in (1, -1)
        ]
        if term != "bbox_loss" or name != "yolov4":  # where the trade-off in CIoU is a constant
            torch.testing.assert_close(slope, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6)
        gradient = torch.func.grad(loss)(out)
        pairs = zip(gradient, direction, strict=True) if isinstance(out, tuple) else [(gradient, direction)]
        torch.testing.assert_close(slope, sum((g * d).sum() for g, d in pairs))


ADVERSARIAL = {
    "points": [[0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
    "lines": [[0.2, 0.3, 0.8, 0.3], [0.5, 0.0, 0.5, 1.0]],
    "duplicates": [[0.2, 0.2, 0.6, 0.6]] * 12,
    "borders": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75]],
    "tiny": [[0.5, 0.5, 0.5 + 1e-7, 0.5 + 1e-7]],
    "many": random.uniform(random.key(3), (100, 2), high=0.5).repeat(1, 2).add(torch.tensor([0, 0, 0.4, 0.3])).tolist(),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite(name, kind):
    model = small(name)
    targets = of(*ADVERSARIAL[kind])
    for scale in (0.0, 1.0, 100.0):
        out = each(lambda x, scale=scale: (x * scale).float(), outputs(name, 1))
        gradient, value = torch.func.grad_and_value(lambda out: total(model, out, targets))(out)
        assert value.isfinite()
        assert all(x.isfinite().all() for x in (gradient if isinstance(gradient, tuple) else (gradient,)))


@pytest.mark.parametrize("name", SMALL)
def test_loss_and_decoding_need_no_values(name):
    """On the meta device: nothing looks at a number."""
    model = small(name)
    out = each(lambda x: x.to("meta"), outputs(name, 2, torch.float32))
    targets = Targets(*(x.to("meta") for x in some_targets(2, 3, torch.float32)))
    assert all(value.is_meta and value.shape == () for value in model.loss(out, targets).values())
    gradient = torch.func.grad(lambda out: total(model, out, targets))(out)
    assert all(x.is_meta for x in (gradient if isinstance(gradient, tuple) else (gradient,)))
    assert model.decode(out, max_detections=7).boxes.shape == (2, 7, 4)


@pytest.mark.parametrize("name", SMALL)
def test_losses_of_half_precision_are_single(name):
    model, targets = small(name), some_targets(dtype=torch.float32)
    out = outputs(name, dtype=torch.float32)
    half = model.loss(each(torch.Tensor.bfloat16, out), targets)
    for term, value in model.loss(out, targets).items():
        assert half[term].dtype == torch.float32
        torch.testing.assert_close(half[term], value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["yolov2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("yolov1", "yolov4"))])
def test_a_gradient_and_a_decoding_are_one_graph(name):
    torch.compiler.reset()
    model = small(name)
    params, buffers = model.init(random.key(0))
    batch = random.normal(random.key(1), (2, 3, 128, 128)), some_targets(dtype=torch.float32)
    objective = train.supervised(model, model.loss)
    gradient = torch.func.grad_and_value(objective, has_aux=True)
    expected, (value, aux) = gradient(params, buffers, batch, random.key(2))
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    found, (same, again) = compiled(params, buffers, batch, random.key(2))
    torch.testing.assert_close(same, value)
    assert tuple(again.metrics) == TERMS
    for n in expected:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-4, atol=1e-5 * float(expected[n].abs().max()) + 1e-7)
    decode = torch.compile(lambda out: model.decode(out, max_detections=5), fullgraph=True, backend="eager")
    for got, wanted in zip(decode(aux.outputs), model.decode(aux.outputs, max_detections=5), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_jitted_step_is_the_eager_one(name):
    model, tx = small(name), optim.sgd(1e-3)
    batch = random.normal(random.key(1), (2, 3, 128, 128)), some_targets(dtype=torch.float32)
    step = train.make_train_step(train.supervised(model, model.loss), tx)
    state = train.create_state(model, tx, random.key(0))
    compiled, measured = jit(step)(state, batch)
    expected, wanted = step(state, batch)
    torch.testing.assert_close(measured["loss"], wanted["loss"], rtol=1e-4, atol=1e-4)
    for n, value in expected.params.items():
        torch.testing.assert_close(dict(compiled.params)[n], value, rtol=1e-3, atol=1e-4)


# --- decoding ----------------------------------------------------------------------------------------------------


def slots_of(*slots):
    """YOLOv2's raw output on one place and as many anchors of 0.4 as slots, each (dx, objectness, class)."""
    model = models.yolov2(num_classes=2, anchors=[[0.4, 0.4]] * len(slots), **SMALL["yolov2"])
    out = torch.zeros(1, len(slots), 7)
    for i, (x, objectness, label) in enumerate(slots):
        out[0, i, 0], out[0, i, 4], out[0, i, 5 + label] = logit(x), logit(objectness), 8.0
    return model, out.reshape(1, -1, 1, 1)


def test_decoding_keeps_the_best_of_each_class():
    model, out = slots_of((0.5, 0.6, 0), (0.52, 0.9, 0), (0.51, 0.7, 1), (0.5, 0.01, 1))
    found = model.decode(out, max_detections=5)
    assert found.mask.tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(found.scores[0, :2], torch.tensor([0.9, 0.7]), atol=1e-3, rtol=0)
    assert found.labels[0].tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([0.32, 0.3, 0.72, 0.7]))
    assert not found.boxes[0, 2:].any()
    assert not found.scores[0, 2:].any()


def test_decoding_by_options():
    model, out = slots_of((0.5, 0.6, 0), (0.52, 0.9, 0), (0.51, 0.7, 1), (0.5, 0.01, 1))
    assert model.decode(out, class_agnostic=True).mask.sum() == 1
    assert model.decode(out, iou_threshold=1.0).mask.sum() == 3
    assert model.decode(out, iou_threshold=1.0, score_threshold=0.001).mask.sum() == 4
    assert model.decode(out, max_detections=1).labels.tolist() == [[0]]
    assert model.decode(out, score_threshold=0.8).mask.sum() == 1
    assert model.decode(out, iou_threshold=1.0, candidates=2).mask.sum() == 2


def test_boxes_are_cut_off_at_the_border():
    model, out = slots_of((0.99, 0.9, 0))
    torch.testing.assert_close(model.decode(out).boxes[0, 0], torch.tensor([0.79, 0.3, 1.0, 0.7]))
    assert model.predictions(out).boxes[0, 0, 2] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_detections": 0}, "max_detections must be an integer of at least 1, got 0"),
        ({"max_detections": True}, "max_detections must be an integer of at least 1, got True"),
        ({"candidates": 2.0}, "candidates must be an integer of at least 1, got 2.0"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"score_threshold": 30.0}, r"score_threshold must be in \[0, 1\], got 30.0"),
    ],
)
def test_decoding_refuses(options, message):
    model, out = slots_of((0.5, 0.5, 0))
    with pytest.raises(ValueError, match=message):
        model.decode(out, **options)


# --- options -----------------------------------------------------------------------------------------------------


def test_frozen_norms_stand_still():
    model = small("yolov2", frozen_norm=True)
    params, buffers = model.init(random.key(0))
    frozen = [n for n in buffers if n.startswith("backbone.")]
    assert {n.rsplit(".")[-1] for n in frozen} == {"weight", "bias", "running_mean", "running_var"}
    assert not [n for n in params if n.startswith("backbone.") and params[n].ndim == 1]
    x = random.normal(random.key(1), (2, 3, 64, 64))
    _, new = model.apply(params, buffers, x, train=True)
    assert all(torch.equal(new[n], buffers[n]) for n in frozen)
    assert not torch.equal(new["block5.1.running_mean"], buffers["block5.1.running_mean"])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_body_starts_from_a_classifiers_weights(frozen, tmp_path):
    body = {"layout": SMALL["yolov2"]["layout"], "stem_channels": 8}
    params, buffers = models.darknet19(num_classes=4, **body).init(random.key(9))
    torch.save(params | buffers, tmp_path / "body.pth")
    model = small("yolov2", body_weights=tmp_path / "body.pth", frozen_norm=frozen)
    found, statistics = model.init(random.key(0))
    fresh, _ = small("yolov2", frozen_norm=frozen).init(random.key(0))
    for n, value in (params | buffers).items():
        name = n.replace("features.", "backbone.")
        if n.startswith("features.") and not (frozen and n.endswith("num_batches_tracked")):
            assert torch.equal((found | statistics)[name], value)
    assert torch.equal(found["block5.0.weight"], fresh["block5.0.weight"])
    assert not torch.equal(found["backbone.stem.0.weight"], fresh["backbone.stem.0.weight"])
    with pytest.raises(ValueError, match=r"body.pth holds no weights of the body of yolov1: backbone"):
        small("yolov1", body_weights=tmp_path / "body.pth")


def test_weights_with_other_anchors_say_so(tmp_path):
    values = small("yolov2", anchors=[[0.1, 0.2]] * 5).init(random.key(0))
    torch.save(values[0] | values[1], tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"the anchors of these weights are not those .* pass anchors=\[\[0.1, 0.2\]"):
        small("yolov2", weights=tmp_path / "w.pth").init(random.key(0))
    again, _ = small("yolov2", anchors=[[0.1, 0.2]] * 5, weights=tmp_path / "w.pth").init(random.key(1))
    assert all(torch.equal(again[n], v) for n, v in values[0].items())


def test_starting_moves_no_global_generator():
    before = torch.get_rng_state()
    small("yolov4").init(random.key(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SMALL)
def test_a_detector_for_other_classes(name, tmp_path):
    values = small(name).init(random.key(0))
    torch.save(values[0] | values[1], tmp_path / "w.pth")
    other = {**SMALL[name], "num_classes": 7, "weights": tmp_path / "w.pth"}
    with pytest.raises(ValueError, match=rf"w.pth has \d+ outputs, {name} was asked for \d+: pass its num_classes and"):
        models.create(name, **other)
    model = models.create(name, **other, new_head=True)
    params, _ = model.init(random.key(1))
    head = models.surgery.head_names(model)
    assert len(head) == (6 if name == "yolov4" else 2)
    assert all(torch.equal(params[n], values[0][n]) != (n in head) for n in params)


@pytest.mark.parametrize("name", SMALL)
def test_building_is_a_function_of_the_key_and_allocates_nothing(name):
    model = small(name)
    assert all(p.is_meta for p in model.skeleton.parameters())
    first, again = (model.init(random.key(3))[0] for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    on_meta, _ = model.init(random.key(3), device="meta")
    assert all(p.is_meta for p in on_meta.values())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("yolov1", {"image_size": 100}, ValueError, "image_size must be a multiple of 64, got 100"),
        ("yolov1", {"num_anchors": 0}, ValueError, "num_anchors must be an integer of at least 1, got 0"),
        ("yolov1", {"lambda_noobj": -1}, ValueError, "lambda_noobj must be a finite number of at least 0, got -1"),
        ("yolov2", {"lambda_obj": math.nan}, ValueError, "lambda_obj must be a finite number of at least 0, got nan"),
        ("yolov2", {"anchors": [0.1, 0.2]}, ValueError, r"anchors must have shape \(A, 2\), got \(2,\)"),
        ("yolov2", {"anchors": [[12, 16]]}, ValueError, r"anchors must be .* in \(0, 1\], fractions of the image"),
        ("yolov2", {"stem_chanels": 8}, TypeError, "models.yolov2 has no option 'stem_chanels'"),
        ("yolov2", {"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1, got 0"),
        ("yolov4", {"anchors": [[[0.1, 0.1]]]}, ValueError, r"anchors must have shape \(3, A, 2\), got \(1, 1, 2\)"),
        ("yolov4", {"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
        ("yolov4", {"iou_threshold": -0.1}, ValueError, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ("yolov2", {"ignore_iou": 1.5}, ValueError, r"ignore_iou must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_cannot_be_built(name, options, error, message):
    with pytest.raises(error, match=message):
        models.create(name, **options)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("yolov1", (1, 3, 64, 64), r"images must be 128 pixels high and wide, .*image_size=128.*, got shape"),
        ("yolov2", (1, 3, 64, 40), r"the sides of images must be multiples of 32, got shape \(1, 3, 64, 40\)"),
        ("yolov4", (1, 3, 16, 32), r"the sides of images must be multiples of 32"),
        ("yolov2", (1, 1, 64, 64), r"images must have shape \(N, 3, H, W\), got \(1, 1, 64, 64\)"),
    ],
)
def test_images_that_do_not_fit(name, shape, message):
    model = small(name)
    with pytest.raises(ValueError, match=message):
        model.apply(*model.init(random.key(0)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": [0.1, 0.1, 1.2, 0.5]}, ValueError, r"boxes must lie in \[0, 1\], .* got \[0.1, 0.1, 1.2, 0.5\]"),
        ({"boxes": [0.5, 0.1, 0.2, 0.5]}, ValueError, r"boxes must have x1 <= x2 and y1 <= y2, .*\(image 1, box 2\)"),
        ({"boxes": [0.5, 0.1, math.nan, 0.5]}, ValueError, r"boxes must be finite, got .*\(image 1, box 2\)"),
        ({"labels": 3}, ValueError, r"labels must lie in \[0, 3\), got 3 \(image 1, box 2\)"),
        ({"labels": -1}, ValueError, r"labels must lie in \[0, 3\), got -1"),
    ],
)
def test_targets_are_refused_by_image_and_box(change, error, message):
    targets = some_targets()
    ((part, value),) = change.items()
    getattr(targets, part)[1, 2] = torch.tensor(value)
    with pytest.raises(error, match=message):
        small("yolov2").check_targets(targets)
    small("yolov2").check_targets(targets._replace(mask=targets.mask & (torch.arange(4) != 2)))


def test_targets_of_another_shape():
    model, targets = small("yolov2"), some_targets()
    with pytest.raises(TypeError, match=r"targets must be Targets\(boxes, labels, mask\), got tuple"):
        model.check_targets(tuple(targets))
    with pytest.raises(ValueError, match=r"targets must have shapes \(N, M, 4\), \(N, M\) and \(N, M\)"):
        model.check_targets(targets._replace(labels=targets.labels[:, :2]))
    with pytest.raises(TypeError, match="integer labels and a bool mask"):
        model.check_targets(targets._replace(mask=targets.mask.long()))
    with pytest.raises(ValueError, match=r"targets must have shapes \(3, M, 4\)"):
        model.loss(outputs("yolov2", 3), targets)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'avg'"):
        model.loss(outputs("yolov2"), targets, reduction="avg")
