"""Batches, prefetching, the embedded digits and the datasets opened by name."""

import hashlib
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from holofunc import data, random

KEY = random.key(7)


def numbered(n, channels=1):
    """Images whose pixels are their index, labelled with it modulo 3."""
    images = torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1).expand(n, channels, 2, 2).contiguous()
    return images, torch.arange(n) % 3


class Pairs:
    """The same data as a dataset; module level, so that workers can be handed one."""

    def __init__(self, n, draw=False):
        self.images, self.labels = numbered(n)
        self.draw = draw

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = torch.rand(1, 2, 2) if self.draw else 0
        return self.images[index] + noise, int(self.labels[index])


class Broken(Pairs):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("disk on fire")
        return super().__getitem__(index)


class Hanging(Pairs):
    def __getitem__(self, index):
        if index == 5:
            time.sleep(3)
        return super().__getitem__(index)


def add_noise(image, key):
    return image + random.uniform(key, image.shape)


def seen(batches):
    return [int(v) for images, _ in batches for v in images[:, 0, 0, 0]]


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


# --- order ---


@given(n=st.integers(1, 40), batch_size=st.integers(1, 12), epoch=st.integers(0, 5), drop_last=st.booleans())
def test_an_epoch_visits_each_sample_once(n, batch_size, epoch, drop_last):
    if drop_last and n < batch_size:
        return
    batches = data.Batches(numbered(n), batch_size, key=KEY, drop_last=drop_last)
    found = list(batches.epoch(epoch))
    sizes = [len(images) for images, _ in found]
    assert len(found) == len(batches)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert len(set(seen(found))) == sum(sizes) == (n - n % batch_size if drop_last else n)
    assert all(torch.equal(images[:, 0, 0, 0].long() % 3, labels) for images, labels in found)


@given(start=st.integers(0, 6), epoch=st.integers(0, 3))
def test_starting_late_is_skipping(start, epoch):
    batches = data.Batches(numbered(23), 4, key=KEY)
    assert same(batches.epoch(epoch, start), list(batches.epoch(epoch))[start:])


def test_skipping_loads_nothing():
    class Counting(Pairs):
        loaded = 0

        def __getitem__(self, index):
            Counting.loaded += 1
            return super().__getitem__(index)

    batches = data.Batches(Counting(40), 4)
    Counting.loaded = 0
    list(batches.epoch(0, start=9))
    assert Counting.loaded == 4


def test_order_is_a_function_of_key_and_epoch():
    first, again = (data.Batches(numbered(64), 8, key=KEY) for _ in range(2))
    list(first.epoch(0))
    list(first.epoch(3, start=2))  # what was iterated before does not matter
    assert seen(first.epoch(2)) == seen(again.epoch(2)) == first.order(2).tolist()
    orders = [tuple(first.order(epoch).tolist()) for epoch in range(5)]
    orders.append(tuple(data.Batches(numbered(64), 8, key=random.key(8)).order(0).tolist()))
    assert len(set(orders)) == 6
    assert seen(first) == list(orders[0])


def test_the_order_stays_what_it_was_released_as():
    assert data.Batches(numbered(8), 4, key=random.key(0)).order(1).tolist() == EXPECTED_ORDER


EXPECTED_ORDER = [3, 2, 6, 4, 0, 5, 1, 7]


def test_without_a_key_the_order_is_the_datasets():
    assert seen(data.Batches(numbered(10), 4)) == list(range(10))
    assert seen(data.Batches(numbered(10), 4, key=KEY, shuffle=False)) == list(range(10))


def test_iterators_do_not_disturb_each_other():
    batches = data.Batches(numbered(12), 4, key=KEY)
    mixed = [pair for pairs in zip(batches.epoch(0), batches.epoch(0), strict=True) for pair in pairs]
    assert same(mixed[::2], mixed[1::2])


# --- the three ways to the same batches ---

CONFIGURATIONS = {
    "arrays": lambda **o: data.Batches(numbered(20), 6, key=KEY, **o),
    "numpy": lambda **o: data.Batches(tuple(part.numpy() for part in numbered(20)), 6, key=KEY, **o),
    "dataset": lambda **o: data.Batches(Pairs(20), 6, key=KEY, **o),
    "list": lambda **o: data.Batches(list(Pairs(20)), 6, key=KEY, **o),
    "workers": lambda **o: data.Batches(Pairs(20), 6, key=KEY, num_workers=2, **o),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("augment", [None, add_noise], ids=["plain", "augmented"])
def test_every_way_gives_the_same_batches(name, augment):
    expected = CONFIGURATIONS["arrays"](augment=augment)
    got = CONFIGURATIONS[name](augment=augment)
    assert same(got.epoch(2, 1), expected.epoch(2, 1))


def test_the_key_of_a_sample_is_neither_its_batchs_nor_another_epochs():
    noise = []
    for batch_size, epoch in ((3, 1), (20, 1), (20, 2)):
        batches = data.Batches(Pairs(20), batch_size, key=KEY, shuffle=False, augment=add_noise)
        noise.append(torch.cat([images for images, _ in batches.epoch(epoch)]) - numbered(20)[0])
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=2e-6)
    assert (noise[1] - noise[2]).abs().amin(dim=(1, 2, 3)).max() > 0.1
    assert len({round(float(v), 4) for v in noise[0][:, 0, 0, 0]}) == 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchs_global_generator_is_seeded_per_sample_and_left_alone(num_workers):
    before = torch.get_rng_state()
    batches = data.Batches(Pairs(12, draw=True), 4, key=KEY, num_workers=num_workers)
    first = list(batches.epoch(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same(batches.epoch(1), first)
    assert same(data.Batches(Pairs(12, draw=True), 4, key=KEY).epoch(1), first)
    torch.set_rng_state(before)


def test_a_transform_comes_before_the_augmentation():
    batches = data.Batches(
        Pairs(4),
        2,
        key=KEY,
        shuffle=False,
        transform=lambda x: x.repeat(3, 1, 1),
        augment=lambda x, key: x * 0 + len(x),
    )
    assert next(iter(batches))[0].unique().tolist() == [3.0]


def test_collate_may_return_any_target():
    def boxes(samples):
        return torch.stack([image for image, _ in samples]), {"labels": [label for _, label in samples]}

    images, targets = next(iter(data.Batches(Pairs(4), 3, collate=boxes)))
    assert images.shape == (3, 1, 2, 2)
    assert targets == {"labels": [0, 1, 2]}


def test_pil_and_numpy_images():
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    images, _ = next(iter(data.Batches([(Image.fromarray(rgb), 0), (rgb, 1)], 2)))
    expected = torch.from_numpy(rgb).permute(2, 0, 1) / 255
    assert torch.equal(images, torch.stack([expected, expected]))
    gray = Image.fromarray(np.full((4, 5), 51, np.uint8))
    assert torch.equal(next(iter(data.Batches([(gray, 0)], 1)))[0], torch.full((1, 1, 4, 5), 0.2))


# --- normalisation ---


def test_uint8_is_scaled_then_normalised():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).reshape(2, 2, 1, 1)
    labels = torch.zeros(2, dtype=torch.int32)
    got, got_labels = next(iter(data.Batches((images, labels), 2, mean=(0.2, 0.5), std=(0.4, 0.25))))
    torch.testing.assert_close(got.flatten(1), torch.tensor([[-0.5, 2.0], [0.0, -0.4]]), rtol=0, atol=1e-6)
    assert (got.dtype, got_labels.dtype) == (torch.float32, torch.int64)
    plain = next(iter(data.Batches((images, labels), 2)))[0]
    assert torch.equal(plain.flatten(1), torch.tensor([[0.0, 1.0], [0.2, 0.4]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_floating_images_are_not_rescaled(dtype):
    images = torch.full((1, 1, 2, 2), 0.5, dtype=dtype)
    batches = data.Batches((images, torch.tensor([0])), 1, mean=0.25, std=2.0)
    assert next(iter(batches))[0].unique().tolist() == [0.125]
    assert next(iter(batches))[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 9, 4), (1, 9, 1), (4, 4, 3), (2, 4, 4), (13, 4, 4), (9, 4, 3)])
def test_narrow_images_have_their_channels_first(shape):
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    assert next(iter(data.Batches((images, torch.arange(2)), 2)))[0].shape == images.shape
    arrays = [(np.zeros((9, 8, 3), np.uint8), 0)]  # whose channels are last, as documented
    assert next(iter(data.Batches(arrays, 1)))[0].shape == (1, 3, 9, 8)


# --- bad input: what is passed, and what the error says ---

IMAGES, LABELS = numbered(6)
BAD = [
    (lambda: data.Batches((IMAGES, LABELS[:5]), 2), ValueError, r"same length, got \(6, 1, 2, 2\) and \(5,\)"),
    (lambda: data.Batches((IMAGES[:0], LABELS[:0]), 2), ValueError, "at least one batch, got 0 samples"),
    (lambda: data.Batches([], 2), ValueError, "at least one batch, got 0 samples"),
    (lambda: data.Batches((IMAGES, LABELS), 0), ValueError, "batch_size must be an integer of at least 1, got 0"),
    (lambda: data.Batches((IMAGES, LABELS), 2.0), ValueError, "batch_size must be an integer of at least 1, got 2.0"),
    (
        lambda: data.Batches((IMAGES, LABELS), 8, drop_last=True),
        ValueError,
        "6 samples for drop_last=True and batch_size=8",
    ),
    (lambda: data.Batches((IMAGES[:, 0], LABELS), 2), ValueError, r"shape \(N, C, H, W\), got \(1, 2, 2\)"),
    *(
        (make, ValueError, r"got \(1, 9, 8, 3\), channels last: move them with images.permute\(0, 3, 1, 2\)")
        for make in (
            lambda: data.Batches((torch.zeros(6, 9, 8, 3, dtype=torch.uint8), LABELS), 2),
            lambda: data.Batches((np.zeros((6, 9, 8, 3), np.uint8), LABELS.numpy()), 2),
            lambda: data.Batches([(torch.zeros(9, 8, 3, dtype=torch.uint8), 0)], 1),
        )
    ),
    (lambda: data.Batches((IMAGES.long(), LABELS), 2), TypeError, "uint8 or floating dtype, got torch.int64"),
    (
        lambda: data.Batches((IMAGES, LABELS.float()), 2, num_classes=3),
        TypeError,
        r"labels must be integer.*got torch.float32 of shape \(6,\)",
    ),
    (lambda: data.Batches((IMAGES, LABELS > 0), 2), TypeError, "labels must be integer class indices.*got torch.bool"),
    (lambda: data.Batches((IMAGES, LABELS), 2, num_classes=2), ValueError, r"labels must lie in \[0, 2\).*got \[2\]"),
    (
        lambda: data.Batches((IMAGES, LABELS - 1), 2, num_classes=3),
        ValueError,
        r"labels must lie in \[0, 3\).*got \[-1\]",
    ),
    (
        lambda: data.Batches((IMAGES, torch.ones(6, 4)), 2, num_classes=3),
        TypeError,
        r"class probabilities \(N, 3\).*\(6, 4\)",
    ),
    (lambda: data.Batches((IMAGES, LABELS, LABELS), 2), ValueError, "must be a pair .*got 3 arrays"),
    (lambda: data.Batches(iter([]), 2), TypeError, "a dataset with len"),
    (lambda: data.Batches({"x": IMAGES}, 2), TypeError, r"a dataset with len\(\) and indices, got dict"),
    (lambda: data.Batches([1, 2, 3], 2), TypeError, r"must be a pair \(image, label\), got int"),
    (lambda: data.Batches([("a.png", 1)], 1), TypeError, "an image must be a tensor.* got str"),
    (lambda: data.Batches((IMAGES, LABELS), 2, shuffle=True), ValueError, "shuffle=True needs a key"),
    (lambda: data.Batches((IMAGES, LABELS), 2, augment=add_noise), ValueError, "augment needs a key"),
    (lambda: data.Batches((IMAGES, LABELS), 2, mean=(0.1, 0.2)), ValueError, "mean must hold 1 or 1 numbers.*got 2"),
    (lambda: data.Batches((IMAGES, LABELS), 2, std=0.0), ValueError, "std must be a finite positive number"),
    (
        lambda: data.Batches((IMAGES, LABELS), 2, num_workers=-1),
        ValueError,
        "num_workers must be an integer of at least 0, got -1",
    ),
    (lambda: data.Batches((IMAGES, LABELS), 2).epoch(0, start=4), ValueError, r"start must lie in \[0, 3\].*got 4"),
    (lambda: data.Batches((IMAGES, LABELS), 2).epoch(-1), ValueError, "epoch must be an integer of at least 0, got -1"),
    (lambda: data.prefetch([], 0), ValueError, "size must be at least 1, got 0"),
    (lambda: data.digits("val"), ValueError, "split must be 'train', 'test' or 'all', got 'val'"),
    (lambda: data.holdout([1], "test", every=1), ValueError, "every must be at least 2, got 1"),
    (lambda: data.open_dataset("mnist"), ValueError, "digits, cifar10, imagenette or folder:PATH, got 'mnist'"),
    (lambda: data.open_dataset("folder:"), ValueError, "got 'folder:'"),
    (lambda: data.open_dataset("digits:7"), ValueError, "got 'digits:7'"),
    (lambda: data.open_dataset("folder:/no/such"), ValueError, "folder '/no/such' does not exist"),
    (lambda: data.open_dataset("digits", split="all"), ValueError, "split must be 'train' or 'test', got 'all'"),
    (lambda: data.open_dataset("digits", image_size=32), ValueError, "image_size must be .*got 32 for 'digits'"),
    (lambda: data.open_dataset("cifar10", "/no/such"), ValueError, "cifar10 is not in '/no/such': download it"),
    (lambda: data.open_dataset("imagenette", "/no/such"), ValueError, "imagenette is not in '/no/such'"),
]


@pytest.mark.parametrize(("build", "error", "match"), BAD, ids=[match[:30] for _, _, match in BAD])
def test_bad_input_is_refused_at_once(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_ignored_labels_are_allowed():
    labels = torch.tensor([0, 1, 255, 2, 1, 0])
    data.Batches((IMAGES, labels), 2, num_classes=3, ignore_index=255)
    with pytest.raises(ValueError, match=r"got \[255\]"):
        data.Batches((IMAGES, labels), 2, num_classes=3)


def test_labels_of_a_dataset_are_checked_batch_by_batch():
    batches = data.Batches(Pairs(6), 2, num_classes=2)
    iterator = iter(batches)
    next(iterator)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        next(iterator)


def test_images_of_different_sizes():
    items = [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 2), 0)]
    with pytest.raises(ValueError, match=r"images of a batch must have one shape, got \[\(1, 2, 2\), \(1, 3, 2\)\]"):
        list(data.Batches(items, 2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exception_names_its_sample(num_workers):
    with pytest.raises(OSError, match="disk on fire") as caught:
        list(data.Batches(Broken(8), 4, num_workers=num_workers))
    assert "while loading sample 5" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


class Stopping(Pairs):
    def __getitem__(self, index):
        if index == 5:
            raise StopIteration
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_does_not_end_an_epoch(num_workers):
    with pytest.raises(RuntimeError, match="the dataset raised StopIteration for sample 5"):
        list(data.Batches(Stopping(8), 2, num_workers=num_workers))


def test_a_worker_that_hangs_is_an_error():
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        list(data.Batches(Hanging(8), 4, num_workers=1, timeout=1))


# --- prefetch ---


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "holofunc-prefetch"]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_prefetch_changes_nothing(size):
    batches = data.Batches(numbered(20), 3, key=KEY)
    assert same(data.prefetch(batches.epoch(1), size), batches.epoch(1))
    assert not prefetch_threads()


def test_prefetch_raises_after_the_batches_before():
    def failing():
        yield 1
        yield 2
        raise OSError("disk on fire")

    iterator = data.prefetch(failing(), 4)
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(iterator)
    assert not prefetch_threads()


def test_prefetch_closes_its_thread_and_its_source():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    iterator = data.prefetch(endless(), 2)
    next(iterator)
    assert prefetch_threads()
    iterator.close()
    assert closed.is_set()
    assert not prefetch_threads()


def test_prefetch_stays_ahead_by_its_size_at_most():
    produced = []

    def source():
        for i in range(20):
            produced.append(i)
            yield i

    iterator = data.prefetch(source(), 3)
    next(iterator)
    time.sleep(0.2)
    assert len(produced) == 1 + 3 + 1  # yielded, ready, and one waiting for room
    assert list(iterator) == list(range(1, 20))


def test_prefetch_moves_tensors_only():
    ((images, label),) = data.prefetch([(torch.ones(2), "name")], device="meta")
    assert images.device.type == "meta"
    assert label == "name"


# --- the digits and the holdout ---


def test_digits_are_the_published_ones():
    images, labels = data.digits("all")
    pixels = (images * 16).to(torch.uint8)
    assert torch.equal(pixels / 16, images)
    assert pixels.shape == (1797, 1, 8, 8)
    assert (int(pixels.min()), int(pixels.max())) == (0, 16)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    content = pixels.numpy().tobytes() + labels.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGITS_SHA256
    source = data.open_dataset("digits")
    torch.testing.assert_close(source.mean[0], images.mean().item(), rtol=0, atol=1e-3)
    torch.testing.assert_close(source.std[0], images.std().item(), rtol=0, atol=1e-3)


DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_digits_hold_out_a_fifth_of_each_class():
    (train, train_labels), (test, test_labels) = data.digits("train"), data.digits("test")
    assert (len(train), len(test)) == (1442, 355)
    share = torch.bincount(test_labels) / (torch.bincount(train_labels) + torch.bincount(test_labels))
    assert ((share - 0.2).abs() < 0.01).all()


@given(labels=st.lists(st.integers(0, 4), max_size=60), every=st.integers(2, 6))
def test_holdout_splits_every_class_in_proportion(labels, every):
    train, test, everything = (data.holdout(labels, split, every=every) for split in ("train", "test", "all"))
    assert sorted(train.tolist() + test.tolist()) == everything.tolist() == list(range(len(labels)))
    whole, held_out = Counter(labels), Counter(labels[i] for i in test)
    assert all(held_out[label] == count // every for label, count in whole.items())


# --- datasets by name ---


def write_images(folder, classes, count=6, size=(10, 8), start=0):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (40 * label, i, 7)).save(folder / name / f"{start + i}.png")


def test_folder_without_parts_holds_out_a_fifth(tmp_path):
    write_images(tmp_path, ["cat", "dog"])
    train, test = (data.open_dataset(f"folder:{tmp_path}", split=split, image_size=4) for split in ("train", "test"))
    assert (len(train.data), len(test.data), train.classes) == (10, 2, ("cat", "dog"))
    images, labels = next(iter(test.batches(2, mean=0.0, std=1.0)))
    assert labels.tolist() == [0, 1]
    torch.testing.assert_close(images[:, :, 1, 1] * 255, torch.tensor([[0.0, 4, 7], [40, 4, 7]]))


@pytest.mark.parametrize("name", ["val", "test"])
def test_folder_with_parts(tmp_path, name):
    write_images(tmp_path / "train", ["cat", "dog"])
    write_images(tmp_path / name, ["cat", "dog"], count=3)
    train, test = (data.open_dataset(f"folder:{tmp_path}", split=split, image_size=4) for split in ("train", "test"))
    assert (len(train.data), len(test.data)) == (12, 6)
    assert next(iter(train.batches(5)))[0].shape == (5, 3, 4, 4)
    write_images(tmp_path / name, ["emu"])
    with pytest.raises(ValueError, match=r"classes of .* must be those of train, \['cat', 'dog'\], got .*emu"):
        data.open_dataset(f"folder:{tmp_path}", split="test")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="needs a folder of images for each class"):
        data.open_dataset(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="needs a folder of images for each class"):
        data.open_dataset(f"folder:{tmp_path}")
    write_images(tmp_path, ["cat"])
    with pytest.raises(ValueError, match=r"at least 2 folders of classes, got \['cat'\]"):
        data.open_dataset(f"folder:{tmp_path}")
    write_images(tmp_path / "few", ["cat", "dog"], count=2)
    with pytest.raises(ValueError, match="too few images to hold out"):
        data.open_dataset(f"folder:{tmp_path / 'few'}", split="test")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", "truncated"], ids=["empty", "html", "truncated"])
def test_a_broken_image_is_named(tmp_path, content):
    write_images(tmp_path, ["cat", "dog"], size=(64, 64))
    victim = tmp_path / "dog" / "0.png"
    victim.write_bytes(victim.read_bytes()[:100] if content == "truncated" else content)
    source = data.open_dataset(f"folder:{tmp_path}", image_size=4)
    with pytest.raises(ValueError, match=r"cannot read image '.*dog/0.png'"):
        list(source.batches(4))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("L", [100, 100, 100]),
        ("RGBA", [10, 20, 30]),
        ("P", [10, 20, 30]),
        ("CMYK", [245, 235, 225]),
        ("1", [255, 255, 255]),
    ],
)
def test_image_modes_become_rgb(tmp_path, mode, expected):
    write_images(tmp_path, ["cat", "dog"])
    color = {"L": 100, "RGBA": (10, 20, 30, 40), "CMYK": (10, 20, 30, 0), "1": 1}.get(mode)
    image = Image.new("RGB", (9, 6), (10, 20, 30)).quantize(2) if mode == "P" else Image.new(mode, (9, 6), color)
    image.save(tmp_path / "cat" / "0.tif")
    (tmp_path / "cat" / "0.png").unlink()
    source = data.open_dataset(f"folder:{tmp_path}", image_size=4)
    image, _ = source.data[0]
    assert image.dtype == torch.uint8
    assert image[:, 2, 2].tolist() == expected


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    write_images(tmp_path, ["cat", "dog"])
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        data.open_dataset(f"folder:{tmp_path}", image_size=4).batches(2)


def test_images_are_turned_upright_and_cropped(tmp_path):
    write_images(tmp_path, ["cat", "dog"])
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half white; turned by the tag, the top half
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    image.save(tmp_path / "cat" / "0.png", exif=exif)
    image, _ = data.open_dataset(f"folder:{tmp_path}", image_size=4).data[0]
    assert image[0].tolist() == [[255] * 4, [255] * 4, [0] * 4, [0] * 4]


def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path, ["cat", "dog"], size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with pytest.raises(ValueError, match=r"cannot read image .*decompression bomb"):
        data.open_dataset(f"folder:{tmp_path}", image_size=4).batches(2)


def test_cifar10_is_kept_in_memory(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint64).reshape(2, 32, 32, 3).astype(np.uint8)
            self.targets, self.classes = [3, 9 if train else 8], list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    source = data.open_dataset("cifar10", tmp_path, split="test")
    images, labels = source.data
    assert images.dtype == torch.uint8
    assert images[1, 2, 3, 4] == Fake("", True, False).data[1, 3, 4, 2]
    assert labels.tolist() == [3, 8]
    assert next(iter(source.batches(2)))[0].shape == (2, 3, 32, 32)


def test_torchvision_transforms_work_inside_a_dataset():
    from torchvision.transforms import v2

    flip = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(2)])
    pixels = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    batches = data.Batches([(pixels, 0)] * 30, 30, key=KEY, transform=flip)
    (first,), (again,) = (list(batches.epoch(0)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert len({tuple(image.flatten().tolist()) for image in first[0]}) > 8
