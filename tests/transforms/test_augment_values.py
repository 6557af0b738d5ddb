"""What augmentations do, by hand: pixels, boxes that follow them, exact shares; and Holocron's resizing."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from holofunc import losses, random, transforms
from holofunc.transforms.policies import equalized

KEYS = [random.key(i) for i in range(12)]


# --- windows -----------------------------------------------------------------------------------------------------


def test_flips_and_crops_are_exact():
    image = torch.rand(3, 7, 9)
    assert torch.equal(transforms.random_flip(1.0)(image, KEYS[0]), image.flip(2))
    assert torch.equal(transforms.random_flip(1.0, vertical=True)(image, KEYS[0]), image.flip(1))
    assert torch.equal(transforms.random_flip(0.0)(image, KEYS[0]), image)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    pieces = {(i, j): padded[:, i : i + 5, j : j + 6] for i in range(7) for j in range(8)}
    seen = set()
    for key in KEYS:
        crop = transforms.random_crop((5, 6), padding=2)(image, key)
        seen |= {place for place, piece in pieces.items() if torch.equal(crop, piece)}
    assert len(seen) > 6


WINDOWED = {
    "flip": transforms.random_flip(1.0),
    "crop": transforms.random_crop(40),
    "resized": transforms.random_resized_crop(48, scale=(0.3, 0.9)),
    "zoom": transforms.zoom_out(1.0, max_scale=2.0),
    "jitter": transforms.large_scale_jitter((50, 70), scale=(0.7, 1.5)),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_boxes_and_masks_follow_the_pixels(name):
    image, mask = torch.zeros(1, 60, 80), torch.zeros(60, 80, dtype=torch.long)
    image[:, 15:45, 20:56], mask[15:45, 20:56] = 1, 3
    boxes = torch.tensor([[20 / 80, 15 / 60, 56 / 80, 45 / 60]]), torch.tensor([7]), torch.tensor([True])
    for key in KEYS:
        seen, (moved, label, there) = WINDOWED[name]((image, boxes), key)
        assert label.item() == 7
        rows, columns = (seen[0] >= 0.5).any(1).nonzero(), (seen[0] >= 0.5).any(0).nonzero()
        if not there:
            assert len(rows) <= 1 or len(columns) <= 1
            continue
        height, width = seen.shape[1:]
        found = torch.stack([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])
        torch.testing.assert_close(found[:, 0], moved[0], rtol=0, atol=1.6 / min(height, width))
        labels = WINDOWED[name]((image, mask), key)[1]
        assert ((labels == 3) == (seen[0] >= 0.5)).float().mean() > 0.93
        assert set(labels.unique().tolist()) <= {0, 3, -100}


def test_boxes_that_are_hardly_seen_are_dropped():
    boxes, there = (
        torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),
        torch.ones(3).bool(),
    )
    right = torch.tensor([0.45, 0.0, 1.0, 1.0])
    moved, mask = transforms.view_boxes(boxes, there, right, min_visible=0.2)
    assert mask.tolist() == [False, True, False]
    assert moved[1].tolist() == [0, 0, 1, 1]
    assert transforms.view_boxes(boxes, there, right)[1].tolist() == [True, True, False]


def test_named_targets_and_named_tuples_keep_their_kind():
    from collections import namedtuple

    targets = namedtuple("Targets", "boxes labels mask")(
        torch.rand(2, 3, 4), torch.zeros(2, 3), torch.ones(2, 3).bool()
    )
    _, same = transforms.random_flip(1.0)((torch.rand(2, 3, 4, 4), targets), KEYS[0])
    assert type(same) is type(targets)
    named = {"boxes": targets.boxes, "labels": targets.labels, "mask": targets.mask}
    _, flipped = transforms.random_flip(1.0)((torch.rand(2, 3, 4, 4), named), KEYS[0])
    assert torch.equal(flipped["boxes"], same.boxes)


def test_mosaic_shows_four_images_and_their_boxes():
    images = torch.arange(1.0, 5.0)[:, None, None, None].expand(4, 1, 16, 16)
    targets = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * 4), torch.arange(1, 5)[:, None], torch.ones(4, 1).bool()
    seen, (boxes, labels, mask) = transforms.mosaic(spread=0.0)((images, targets), KEYS[0])
    assert boxes.shape == (4, 4, 4)
    for i in range(4):
        assert seen[i, 0, 2, 2] == i + 1
        for box, label, there in zip(boxes[i], labels[i], mask[i], strict=True):
            assert there
            x, y = ((box[:2] + box[2:]) / 2 * 16).long()
            assert seen[i, 0, y, x] == label
    kept, (boxes, _, mask) = transforms.mosaic(0.0)((images, targets), KEYS[0])
    assert torch.equal(kept, images)
    assert torch.equal(boxes[:, 0], targets[0][:, 0])
    assert mask.sum() == 4


class Boxed(NamedTuple):
    boxes: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


@pytest.mark.parametrize(
    "augment",
    [transforms.mosaic(), transforms.mixup(3, 1.5), transforms.random_flip()],
    ids=["mosaic", "mixup", "flip"],
)
def test_targets_keep_their_type(augment):
    targets = Boxed(torch.rand(4, 2, 4).sort(-1).values, torch.ones(4, 2).long(), torch.ones(4, 2).bool())
    _, moved = augment((torch.rand(4, 3, 8, 8), targets), KEYS[0])
    assert type(moved) is Boxed
    assert (moved.labels.dtype, moved.mask.dtype) == (torch.int64, torch.bool)


def test_boxes_classes_of_pixels_and_outlines_move_together():
    image = torch.zeros(2, 1, 8, 8)
    image[:, :, 2:4, 1:4] = 1
    outline = image.bool().expand(2, 3, 8, 8) & torch.tensor([True, False, True])[:, None, None]
    targets = {
        "boxes": torch.tensor([1, 2, 4, 4]).div(8).expand(2, 3, 4), "mask": torch.tensor([[True, False, True]] * 2),
        "labels": torch.tensor([[5, 0, 6]] * 2), "masks": image[:, 0].long(), "outlines": outline,
    }  # fmt: skip
    shifted = transforms.windowed(lambda key, size: torch.tensor([0.125, 0.25, 1.125, 1.25]), ignore_index=255)
    seen, moved = shifted((image, targets), KEYS[0])
    assert torch.equal(
        seen[0, 0], torch.zeros(8, 8).index_put((torch.tensor([[0], [1]]), torch.arange(3)), torch.ones(()))
    )
    assert (moved["boxes"][:, [0, 2]] * 8).tolist() == [[[0, 0, 3, 2]] * 2] * 2
    assert torch.equal(moved["mask"], targets["mask"])
    assert torch.equal(moved["labels"], targets["labels"])
    assert torch.equal(moved["masks"][0, :6, :7], seen[0, 0, :6, :7].long())
    assert (moved["masks"][0, 6:] == 255).all()
    assert moved["outlines"].dtype == torch.bool
    assert torch.equal(moved["outlines"][1, 2], seen[1, 0].bool())
    assert not moved["outlines"][:, 1].any()


# --- mixing ------------------------------------------------------------------------------------------------------


def test_mixed_images_have_the_boxes_of_both():
    images = torch.tensor([1.0, 10.0, 100.0])[:, None, None, None].expand(3, 1, 4, 4)
    targets = torch.rand(3, 2, 4).sort(-1).values, torch.tensor([[1, 1], [10, 10], [100, 100]]), torch.ones(3, 2).bool()
    for key in KEYS:
        seen, (boxes, labels, mask) = transforms.mixup(1, 1.5)((images, targets), key)
        assert torch.equal(boxes[:, :2], targets[0])
        assert mask.all()
        assert boxes.shape == (3, 4, 4)
        for value, (own, _, other, _) in zip(seen[:, 0, 0, 0].tolist(), labels.tolist(), strict=True):
            assert min(own, other) - 1e-4 <= value <= max(own, other) + 1e-4
    same, kept = transforms.mixup(1, 0.0)((images, targets), KEYS[0])
    assert same is images
    assert kept is targets


def test_mixed_labels_tell_what_is_in_the_image():
    images, labels = torch.arange(6.0)[:, None, None, None].expand(6, 1, 8, 8), torch.arange(6)
    for augment in (transforms.mixup(6), transforms.cutmix(6), transforms.mixup(6, 1.0, per_sample=False)):
        for key in KEYS:
            mixed, targets = augment((images, labels), key)
            torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(6.0))
            torch.testing.assert_close(targets.sum(1), torch.ones(6))
            assert ((targets > 0).sum(1) <= 2).all()
    shares = transforms.mixup(6, 1.0)((images, labels), KEYS[0])[1].amax(1)
    assert len(shares.unique()) > 2
    shares = transforms.mixup(6, 1.0, per_sample=False)((images, labels), KEYS[0])[1].amax(1)
    assert len(shares.round(decimals=4).unique()) <= 2


def test_mixup_keeps_holocrons_forms_of_targets():
    images = torch.rand(4, 3, 5, 5)
    same, targets = transforms.mixup(3, 0.0)((images, torch.tensor([0, 1, 2, 0])), KEYS[0])
    assert same is images
    assert targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert transforms.mixup(1)((images, torch.tensor([0, 1, 1, 0])), KEYS[0])[1].shape == (4, 1)
    soft = torch.full((4, 3), 1 / 3)
    torch.testing.assert_close(transforms.mixup(3)((images, soft), KEYS[0])[1], soft)


def test_ignored_labels_have_no_share():
    images = torch.rand(3, 1, 4, 4)
    _, targets = transforms.mixup(2, 0.0)((images, torch.tensor([0, -100, 1])), KEYS[0])
    logits = torch.tensor([[2.0, 0.0], [5.0, 1.0], [0.0, 0.0]])
    expected = losses.cross_entropy(logits, torch.tensor([0, -100, 1]))
    torch.testing.assert_close(losses.cross_entropy(logits, targets), expected)


def test_pasted_masks_stay_labels():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8)
    masks = torch.arange(4)[:, None, None].expand(4, 8, 8)
    mixed, pasted = transforms.cutmix(4)((images, masks), KEYS[0])
    assert torch.equal(mixed[:, 0].long(), pasted)


# --- pixels ------------------------------------------------------------------------------------------------------


def test_erased_share_is_in_its_range():
    shares = [1 - transforms.random_erasing(1.0, scale=(0.1, 0.2))(torch.ones(1, 40, 40), key).mean() for key in KEYS]
    assert all(0.08 < share < 0.22 for share in shares)
    assert len({round(share.item(), 4) for share in shares}) > 6
    untouched = torch.ones(1, 9, 9)
    assert torch.equal(transforms.random_erasing(0.0)(untouched, KEYS[0]), untouched)


def test_jitter_of_nothing_and_its_bounds():
    image = torch.rand(3, 6, 6)
    assert torch.equal(transforms.color_jitter()(image, KEYS[0]), image)
    for key in KEYS:
        seen = transforms.color_jitter(brightness=0.3)(image * 0.5, key) / (image * 0.5)
        assert 0.7 <= seen.mean() <= 1.3
        assert seen.std() < 1e-4
        gray = transforms.color_jitter(saturation=0.9, hue=0.5)(torch.full((3, 4, 4), 0.3), key)
        torch.testing.assert_close(gray, torch.full((3, 4, 4), 0.3))


def test_rand_augment_is_gentle_at_zero_and_covers_its_list():
    image = torch.rand(3, 16, 16)
    changed = sum(not torch.equal(transforms.rand_augment(1, 20.0)(image, random.key(i)), image) for i in range(40))
    assert changed > 30
    level = equalized(torch.tensor([[[0.0, 0.1, 0.1, 0.5]]]).expand(1, 256, 4))
    assert level.amax() == 1


def test_one_of_follows_its_weights():
    flip, still = transforms.random_flip(1.0), transforms.random_flip(0.0)
    image = torch.rand(1, 3, 3)
    assert torch.equal(transforms.one_of(flip, still, weights=[0, 1])(image, KEYS[0]), image)
    assert torch.equal(transforms.one_of(flip, still, weights=[1, 0])(image, KEYS[0]), image.flip(2))


# --- Resize, RandomZoomOut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.from_numpy, Image.fromarray], ids=["tensor", "PIL"])
def test_resize_squishes_or_pads(make):
    white = np.full((16, 32, 3), 255, np.uint8)
    image = make(white if make is Image.fromarray else white.transpose(2, 0, 1).copy())
    as_array = lambda x: np.asarray(x) if isinstance(x, Image.Image) else x.permute(1, 2, 0).numpy()  # noqa: E731
    assert (as_array(transforms.Resize((32, 32))(image)) == 255).all()
    padded = as_array(transforms.Resize((32, 32), "pad")(image))
    assert padded.shape == (32, 32, 3)
    assert (padded[:8] == 0).all()
    assert (padded[24:] == 0).all()
    assert (padded[8:24] == 255).all()
    assert (as_array(transforms.Resize((32, 32), "pad", pad_mode="edge")(image)) == 255).all()
    assert (as_array(transforms.Resize((32, 32), "pad", fill=7)(image))[0] == 7).all()
    narrow = as_array(transforms.Resize((8, 64), "pad")(image))
    assert narrow.shape == (8, 64, 3)


@pytest.mark.parametrize("pad_mode", ["constant", "edge", "reflect", "symmetric"])
def test_borders_may_be_wider_than_what_they_repeat(pad_mode):
    """As NumPy has it, whether the image is a tensor or PIL's."""
    resize = transforms.Resize((33, 32), mode="pad", pad_mode=pad_mode)
    for height in (1, 4):
        image = torch.arange(3 * height * 32).reshape(3, height, 32).to(torch.uint8)
        top = (33 - height) // 2
        border = (0, 0), (top, 33 - height - top), (0, 0)
        expected = torch.from_numpy(np.pad(image.numpy(), border, mode=pad_mode))
        assert torch.equal(resize(image), expected)
        drawn = resize(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal(torch.from_numpy(np.array(drawn)).permute(2, 0, 1), expected)


def test_boxes_and_masks_are_resized_alike():
    sample = {
        "image": tv_tensors.Image(torch.rand(3, 20, 40)),
        "boxes": tv_tensors.BoundingBoxes([[0, 0, 40, 20], [10, 5, 20, 10]], format="XYXY", canvas_size=(20, 40)),
        "mask": tv_tensors.Mask(torch.ones(20, 40, dtype=torch.uint8)),
        "label": 3,
    }
    seen = transforms.Resize((80, 80), "pad")(sample)
    assert seen["image"].shape == (3, 80, 80)
    assert seen["boxes"].tolist() == [[0, 20, 80, 60], [20, 30, 40, 40]]
    assert seen["mask"].sum() == 40 * 80
    assert seen["label"] == 3
    small = transforms.RandomZoomOut((80, 80), (0.25, 0.25))(sample, KEYS[0])
    assert small["boxes"][0].tolist() == [20, 30, 60, 50]
    assert small["mask"].sum() == 20 * 40
    for mode in ("edge", "reflect", "symmetric"):  # whatever is around the image, boxes move with it
        assert transforms.Resize((80, 80), "pad", pad_mode=mode)(sample)["boxes"].tolist() == seen["boxes"].tolist()


@pytest.mark.parametrize("size", [(37, 101), (101, 37), (64, 64), (200, 250)])
def test_boxes_found_in_a_padded_image_are_led_back(size):
    resize, (height, width) = transforms.Resize((64, 64), "pad"), size
    own = torch.tensor([0.125, 0.25, 0.5, 0.75])
    boxes = tv_tensors.BoundingBoxes(own * torch.tensor([width, height] * 2), format="XYXY", canvas_size=size)
    _, found = resize((tv_tensors.Image(torch.zeros(1, *size)), boxes))
    back, there = transforms.view_boxes(found.as_subclass(torch.Tensor) / 64, torch.tensor([True]), resize.window(size))
    assert there.all()
    torch.testing.assert_close(back[0], own, atol=1e-6, rtol=0)
    assert transforms.Resize((64, 32)).window(size).tolist() == [0, 0, 1, 1]


def test_what_lies_outside_of_a_mask_is_of_its_dtype():
    away = transforms.windowed(lambda key, size: torch.tensor([0.5, 0.0, 1.5, 1.0]))
    images, masks = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2)
    assert away((images, masks.bool()), KEYS[0])[1].tolist() == [[[True, False]] * 2]
    assert away((images, masks.short()), KEYS[0])[1].tolist() == [[[1, -100]] * 2]
    with pytest.raises(ValueError, match=r"fill must be a number that torch.uint8 has, got -100: make the mask int64"):
        away((images, masks.byte()), KEYS[0])


def test_zoom_out_never_exceeds_its_size():
    for i in range(60):
        assert transforms.RandomZoomOut((33, 33), (0.98, 1.0))(torch.ones(1, 20, 21), random.key(i)).shape == (
            1,
            33,
            33,
        )
    assert transforms.RandomZoomOut((8, 8), (1.0, 1.0))(torch.ones(1, 20, 20), KEYS[0]).shape == (1, 8, 8)
    assert transforms.Resize((2, 64), "pad")(torch.ones(1, 500, 2)).shape == (1, 2, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transforms.Resize(32), "size must be a height and a width, integers of at least 1, got 32"),
        (lambda: transforms.Resize((4, 4), "stretch"), "mode must be 'squish' or 'pad', got 'stretch'"),
        (lambda: transforms.Resize((4, 4), pad_mode="wrap"), "pad_mode must be 'constant', 'edge'.* got 'wrap'"),
        (lambda: transforms.Resize((4, 4), interpolation="cubic"), "interpolation must be one of nearest.* got 'cubic'"),
        (lambda: transforms.RandomZoomOut((4, 4), (0.0, 1.0)), r"scale must be two numbers in \(0, 1\]"),
        (lambda: transforms.RandomZoomOut((4, 4), (0.5, 2.0)), r"scale must be two numbers in \(0, 1\]"),
        (lambda: transforms.random_flip(2.0), r"p must be in \[0, 1\], got 2.0"),
        (lambda: transforms.random_crop(0), "size must be a height and a width of at least 1"),
        (lambda: transforms.random_crop(9)(torch.ones(1, 4, 4), KEYS[0]), r"size must be at most .* \(4, 4\), got \(9, 9\)"),
        (lambda: transforms.random_resized_crop(scale=(0.5, 2.0)), r"scale must be two numbers in \(0, 1\]"),
        (lambda: transforms.zoom_out(max_scale=0.5), "max_scale must be finite and at least 1, got 0.5"),
        (lambda: transforms.mixup(0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: transforms.cutmix(3, -1.0), "alpha must be finite and at least 0, got -1.0"),
        (lambda: transforms.mixup(3, math.nan), "alpha must be finite and at least 0, got nan"),
        (lambda: transforms.random_crop(2.5), "size must be a height and a width of at least 1, .* got 2.5"),
        (lambda: transforms.random_crop(padding=1.5), "padding must be an integer of at least 0, got 1.5"),
        (lambda: transforms.Resize((2.5, 3)), r"integers of at least 1, got \(2.5, 3\)"),
        (lambda: transforms.color_jitter(contrast=math.nan), "contrast and saturation must be finite"),
        (lambda: transforms.rand_augment(2.5), "num_ops must be an integer of at least 1, got 2.5"),
        (lambda: transforms.mixup(3)((torch.ones(2, 1, 2, 2), torch.ones(2)), KEYS[0]), r"targets must be integers \(B, ...\)"),
        (lambda: transforms.color_jitter(hue=0.7), r"hue in \[0, 0.5\], got 0.0, 0.0, 0.0 and 0.7"),
        (lambda: transforms.random_erasing(ratio=(3.0, 0.3)), r"ratio must be two numbers in \(0, inf\]"),
        (lambda: transforms.rand_augment(0), "num_ops must be an integer of at least 1, got 0"),
        (lambda: transforms.rand_augment(magnitude=math.inf), r"magnitude must be in \[0, 30\], got inf"),
        (lambda: transforms.mosaic(spread=0.5), r"spread in \[0, 0.5\), got 1.0 and 0.5"),
        (lambda: transforms.mosaic()((torch.ones(2, 1, 2, 2), torch.ones(2)), KEYS[0]), "targets must be .boxes, labels, mask"),
        (lambda: transforms.denormalized(print, 0.5, 0.0), "std must be a finite and positive number, .* got 0.0"),
        (lambda: transforms.denormalized(print, [math.nan], 1.0), r"mean must be a finite number, .* got \[nan\]"),
        (lambda: transforms.denormalized(print, [0.5, 0.5], 1.0)(torch.ones(3, 2, 2), KEYS[0]), "mean must hold a number for each of 3 channels"),
        (lambda: transforms.one_of(), "weights must be one number for each of 0 augments"),
        (lambda: transforms.one_of(transforms.random_flip(), transforms.mixup(3))((torch.ones(3, 1, 2, 2), torch.arange(3)), KEYS[0]), "augments must return the same shapes and dtypes"),
    ],
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
