"""Every augmentation through the same laws: purity, keys, one graph, samples by themselves, kept dtypes."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from holofunc import jit, lift, losses, metrics, optim, random, train, transforms

B, H, W, M, K = 4, 12, 16, 3, 5
IMAGES = torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 4, 2])
MASKS = torch.randint(0, K, (B, H, W), generator=torch.Generator().manual_seed(1))
CORNER = torch.rand(B, M, 2, generator=torch.Generator().manual_seed(2)) / 2
BOXES = (torch.cat([CORNER, CORNER + 0.3], -1), LABELS[:, None].expand(B, M), torch.ones(B, M, dtype=torch.bool))

OF_ONE = {  # of one image too
    "random_flip": transforms.random_flip(),
    "random_flip, vertical": transforms.random_flip(vertical=True),
    "random_crop": transforms.random_crop((8, 10), padding=2),
    "random_resized_crop": transforms.random_resized_crop(8),
    "zoom_out": transforms.zoom_out(0.8),
    "large_scale_jitter": transforms.large_scale_jitter((10, 10), scale=(0.5, 2.0), min_visible=0.2),
    "color_jitter": transforms.color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "random_erasing": transforms.random_erasing(0.9, value=None),
    "rand_augment": transforms.rand_augment(2, 15.0),
    "compose": transforms.compose(transforms.random_flip(), transforms.random_crop(padding=1)),
    "denormalized": transforms.denormalized(transforms.color_jitter(brightness=0.4), [0.5, 0.4, 0.3], 0.25),
}
CASES = {
    **{name: (augment, (IMAGES, LABELS)) for name, augment in OF_ONE.items()},
    **{
        f"{name}, boxes": (OF_ONE[name], (IMAGES, BOXES))
        for name in ("random_flip", "random_crop", "random_resized_crop", "zoom_out", "large_scale_jitter")
    },
    **{f"{name}, masks": (OF_ONE[name], (IMAGES, MASKS)) for name in ("random_flip", "random_crop", "zoom_out")},
    "mosaic, boxes": (transforms.mosaic(0.7), (IMAGES, BOXES)),
    "mixup": (transforms.mixup(K), (IMAGES, LABELS)),
    "mixup, one share": (transforms.mixup(K, per_sample=False), (IMAGES, torch.eye(K)[:B])),
    "mixup, masks": (transforms.mixup(K), (IMAGES, MASKS)),
    "mixup, boxes": (transforms.mixup(K, 1.5), (IMAGES, BOXES)),
    "cutmix": (transforms.cutmix(K), (IMAGES, LABELS)),
    "cutmix, masks": (transforms.cutmix(K), (IMAGES, MASKS)),
    "one_of": (transforms.one_of(transforms.mixup(K), transforms.cutmix(K), weights=[1, 2]), (IMAGES, LABELS)),
}
every = pytest.mark.parametrize("name", CASES)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def test_table_is_complete():
    made = {name.split(",")[0] for name in CASES}
    pieces = {"Augment", "RandomZoomOut", "Resize", "view", "view_boxes", "view_labels", "windowed"}
    assert made == set(transforms.__all__) - pieces


@every
def test_pure_and_by_key(name):
    augment, batch = CASES[name]
    before, state = tree_map(torch.clone, batch), torch.random.get_rng_state()
    first = augment(batch, random.key(3))
    assert equal(first, augment(batch, random.key(3)))
    assert equal(batch, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any(not torch.equal(first[0], augment(batch, random.key(k))[0]) for k in range(4, 9))
    assert first[0].dtype == torch.float32
    assert first[0].isfinite().all()


TRACED = {"random_crop, masks", "mixup"}  # tracing the generator takes seconds each


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in TRACED else pytest.mark.slow) for n in CASES])
def test_one_graph_with_the_same_result(name):
    augment, batch = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    got, expected = compiled(batch, random.key(1)), augment(batch, random.key(1))
    for x, y in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", [name for name in OF_ONE if name != "compose"])  # which folds the batch's key first
def test_one_image_in_a_worker_sees_what_it_sees_in_a_batch(name):
    augment, keys = OF_ONE[name], random.split(random.key(2), B)
    images = augment(IMAGES, random.key(2))
    assert torch.equal(augment((IMAGES, LABELS), random.key(2))[0], images)
    for i in range(B):
        torch.testing.assert_close(augment(IMAGES[i], keys[i]), images[i], rtol=1e-6, atol=1e-6)
    same = augment(IMAGES[:1].expand(B, -1, -1, -1), random.key(5))
    assert len({tuple(image.flatten().tolist()) for image in same}) > 1  # each sample draws for itself


@every
def test_integers_are_refused(name):
    augment, (images, targets) = CASES[name]
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8"):
        augment(((images * 255).byte(), targets), random.key(0))
    with pytest.raises(ValueError, match="images must be a tensor"):
        augment((images[0, 0], targets), random.key(0))


@every
def test_what_is_no_batch_is_named(name):
    augment, (images, targets) = CASES[name]
    with pytest.raises(TypeError, match=r"batch must be .*\(images, targets\), got dict"):
        augment({"images": images, "targets": targets}, random.key(0))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_kept_dtypes_and_layouts(name, dtype):
    augment, (images, targets) = CASES[name]
    single = augment((images, targets), random.key(3))
    other = augment((images.to(dtype), targets), random.key(3))
    assert other[0].dtype == dtype
    assert (other[0].float() - single[0]).abs().mean() < 0.03
    for x, y in zip(tree_leaves(other[1]), tree_leaves(single[1]), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=1e-2)
    strided = augment((images.to(memory_format=torch.channels_last), targets), random.key(3))
    torch.testing.assert_close(strided[0], single[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 2), (3, 1, 7)])
@pytest.mark.parametrize("name", [n for n in OF_ONE if n not in ("random_crop", "denormalized")])
def test_images_may_be_tiny_and_of_any_channels(name, shape):
    images = random.uniform(random.key(2), (2, *shape))
    assert OF_ONE[name](images, random.key(3)).isfinite().all()


@every
def test_a_batch_of_no_images_is_named(name):
    augment, (images, targets) = CASES[name]
    with pytest.raises(ValueError, match="images must hold at least one image, got shape"):
        augment((images[:0], tree_map(lambda x: x[:0], targets)), random.key(0))


def test_inside_a_training_step():
    model, tx = lift(torch.nn.Sequential, torch.nn.Flatten(), torch.nn.Linear(3 * H * W, K)), optim.sgd(0.1)
    augment = transforms.compose(transforms.random_flip(), transforms.mixup(K))
    objective = train.supervised(model, losses.cross_entropy, metrics={"accuracy": metrics.accuracy()})
    step = train.make_train_step(objective, tx, augment=augment)
    state = train.create_state(model, tx, random.key(0))
    _, found = step(state, (IMAGES, LABELS))
    assert found["loss"].isfinite()


@pytest.mark.slow
def test_compiled_by_inductor_inside_a_training_step():
    model, tx = lift(torch.nn.Sequential, torch.nn.Flatten(), torch.nn.Linear(3 * H * W, K)), optim.sgd(0.1)
    augment = transforms.compose(transforms.random_flip(), transforms.rand_augment(), transforms.cutmix(K))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx, augment=augment)
    state = train.create_state(model, tx, random.key(0))
    _, eager = step(state, (IMAGES, LABELS))
    _, compiled = jit(step)(state, (IMAGES, LABELS))
    torch.testing.assert_close(compiled["loss"], eager["loss"], rtol=1e-4, atol=1e-4)
