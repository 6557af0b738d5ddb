"""Images as they come: files of any kind, folders as people have them, arrays, and what a run remembers of its data."""

import functools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from holofunc import config, data, random, transforms
from holofunc.data.pictures import read

RED = Image.new("RGB", (20, 10), (200, 0, 0))


def put(path, image=RED, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photos(folder, classes=("a", "b")):
    for name in classes:
        for i in range(5):
            put(folder / name / f"bild é{i}.png")
    return folder


# --- files -----------------------------------------------------------------------------------------------------------


def palette():
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30] * 256)
    return image


@pytest.mark.parametrize(
    ("image", "name", "first"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.tif", [255, 0, 0]),
        (palette(), "a.png", [10, 20, 30]),
        (palette(), "a.gif.bmp", [10, 20, 30]),
        (Image.new("LA", (8, 8), (77, 255)), "a.png", [77] * 3),
        (Image.new("RGBA", (8, 8), (1, 2, 3, 9)), "a.png", [1, 2, 3]),
        (Image.new("1", (8, 8), 1), "a.png", [255] * 3),
    ],
    ids=lambda x: x.mode if isinstance(x, Image.Image) else None,
)
def test_every_way_to_read_a_file_sees_the_same_colours(tmp_path, image, name, first):
    path = put(tmp_path / name, image)
    assert data.datasets.Decode(4)(str(path))[:, 0, 0].tolist() == first
    assert list(read(path).getpixel((0, 0))) == first
    lines = data.TextFiles([path, path], ["a", "b"], data.CTCCodec("ab"), 32)
    grey = round(0.299 * first[0] + 0.587 * first[1] + 0.114 * first[2])
    assert abs(int(lines[0][0][0, 0, 0]) - grey) <= 1


def test_upright_where_nothing_lies_on_the_pixels(tmp_path):
    exif, image = Image.Exif(), Image.new("RGB", (8, 8))
    exif[0x0112] = 6  # turned by a quarter
    image.paste((255, 0, 0), (0, 0, 8, 4))
    path = put(tmp_path / "a.png", image, exif=exif)
    assert [read(path).getpixel((x, 4))[0] for x in (0, 7)] == [0, 255]
    assert [read(path, upright=False).getpixel((4, y))[0] for y in (0, 7)] == [255, 0]


def test_images_of_a_dataset_may_have_a_palette_or_two_colours():
    drawn = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)).quantize(16)

    class Drawn(torch.utils.data.Dataset):
        def __init__(self, image):
            self.image = image

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.image, 0

    images, _ = next(iter(data.Batches(Drawn(drawn), 1)))
    expected = torch.from_numpy(np.array(drawn.convert("RGB"))).permute(2, 0, 1)
    torch.testing.assert_close(images[0] * 255, expected.float())
    assert next(iter(data.Batches(Drawn(Image.new("1", (4, 4), 1)), 1)))[0].eq(1).all()


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_is_hidden_is_no_data_however_deep(tmp_path):
    folder = photos(tmp_path / ".somewhere" / "p", ("hund 犬", "katze ü"))
    for name in (
        "__MACOSX/a.png",
        ".cache/a.png",
        "hund 犬/.thumbs/a.png",
        "hund 犬/__MACOSX/a.png",
        "katze ü/._a.png",
    ):
        put(folder / name).write_bytes(b"broken")
    source = data.open_dataset(f"folder:{folder}", image_size=8)
    assert (source.classes, len(source.data)) == (("hund 犬", "katze ü"), 8)
    assert data.check_folder(folder) == []


def test_every_file_that_training_would_meet_is_checked(tmp_path):
    folder, elsewhere = photos(tmp_path / "q"), tmp_path / "elsewhere"
    (folder / "a/zero.jpg").write_bytes(b"")
    (folder / "a/x.PNG").write_bytes(b"GIF89a")
    (folder / "a/folder.png").mkdir()
    put(elsewhere / "good.png")
    (elsewhere / "bad.png").write_bytes(b"no")
    put(folder / "b/deep.png", Image.fromarray((np.arange(64).reshape(8, 8) * 900).astype(np.uint16)))
    os.symlink(elsewhere, folder / "b/linked")
    os.symlink(folder / "nowhere.png", folder / "a/link.png")
    os.symlink(folder, folder / "b/up")  # in a circle
    found = data.check_folder(folder)
    assert [Path(each.path).name for each in found] == ["link.png", "x.PNG", "zero.jpg", "deep.png", "bad.png"]
    assert "more than 8 bits" in found[3].reason


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_may_run_backwards_and_be_read_only():
    images, labels = np.zeros((6, 1, 4, 4), np.uint8), np.arange(6)
    assert next(iter(data.Batches((images[::-1], labels[::-1]), 3)))[1].tolist() == [5, 4, 3]
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.Batches((images, labels), 3)


# --- fingerprints ----------------------------------------------------------------------------------------------------

WAYS = {
    "torchvision's": lambda n: {"transform": v2.Resize((n, n))},
    "several": lambda n: {"transform": v2.Compose([v2.Resize((n, n)), v2.ToDtype(torch.float32)])},
    "of an object": lambda n: {"transform": transforms.Resize((n, n))},
    "of a fill": lambda n: {"augment": transforms.RandomZoomOut((8, 8), fill=n)},
    "of a function": lambda n: {"augment": transforms.random_crop(padding=n)},
    "of functions": lambda n: {
        "augment": transforms.compose(transforms.random_flip(), transforms.random_erasing(p=n / 10))
    },
    "partial": lambda n: {"transform": functools.partial(torch.roll, shifts=n)},
    "which": lambda n: {"augment": transforms.random_flip() if n == 2 else transforms.random_crop()},
    "of a tensor": lambda n: {"transform": (lambda shift: lambda x: x + shift)(torch.tensor(float(n)))},
}


def test_another_dataset_of_as_many_samples_is_another_fingerprint():
    class Labelled(torch.utils.data.Dataset):
        def __init__(self, label, size):
            self.label, self.size = label, size

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.zeros(1, self.size, self.size), self.label

    one, again, label, size = (
        data.Batches(Labelled(*options), 2, num_workers=workers).fingerprint()
        for *options, workers in ((1, 4, 0), (1, 4, 2), (2, 4, 0), (1, 5, 0))
    )
    assert one == again
    assert one != label
    assert one != size


@pytest.mark.parametrize("way", WAYS)
def test_other_options_of_a_transform_are_another_fingerprint(way):
    def fingerprint(n):
        images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.int64)
        return data.Batches((images, labels), 3, key=random.key(0), **WAYS[way](n)).fingerprint()

    assert fingerprint(2) == fingerprint(2)
    assert fingerprint(2) != fingerprint(3)


def test_texts_may_begin_as_those_of_windows_do(tmp_path):
    """With a mark of the byte order."""
    for i in range(5):
        put(tmp_path / f"{i}.png")
        put(tmp_path / "images" / f"{i}.png", Image.new("RGB", (4, 4)))
        put(tmp_path / "masks" / f"{i}.png", Image.new("L", (4, 4)))
    (tmp_path / "labels.txt").write_text("\n".join(f"{i}.png\ta" for i in range(5)), encoding="utf-8-sig")
    (tmp_path / "classes.txt").write_text("ground\nhill", encoding="utf-8-sig")
    (tmp_path / "run.toml").write_text("lr = 0.5", encoding="utf-8-sig")
    assert len(data.open_lines(f"text:{tmp_path}", width=32)) == 4
    assert data.open_masks(f"masks:{tmp_path}").classes == ("ground", "hill")
    assert config.read(tmp_path / "run.toml").lr == 0.5
