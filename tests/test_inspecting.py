"""Looking at datasets: sizes of images, functions of all samples."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import data


def test_sizes_of_pil_images_tensors_and_arrays():
    images = [Image.new("RGB", (30, 20)), torch.zeros(3, 40, 10), np.zeros((60, 50, 3), np.uint8), torch.zeros(9, 7)]
    sizes = data.find_image_size([(image, 0) for image in images], num_workers=2)
    assert sizes.heights == [20, 40, 60, 9]
    assert sizes.widths == [30, 10, 50, 7]
    assert (sizes.height, sizes.width, sizes.side) == (30, 20, round(500**0.5))
    assert data.find_image_size(images).heights == sizes.heights
    with pytest.raises(ValueError, match="dataset must hold at least one image, got none"):
        data.find_image_size([])
    with pytest.raises(TypeError, match=r"dataset must hold PIL images or arrays .* got str"):
        data.find_image_size(["a.png"])


def test_parallel_is_a_list_in_order(capsys):
    items = list(range(50))
    for options in ({"num_workers": 0}, {"num_workers": 3}, {"num_workers": 2, "kind": "process"}, {"progress": True}):
        assert data.parallel(abs, items, **options) == items
    assert "50/50" in capsys.readouterr().err
    names = data.parallel(lambda _: threading.current_thread().name, items, num_workers=2)
    assert all(name != threading.main_thread().name for name in names)


def test_errors_come_through():
    with pytest.raises(ZeroDivisionError):
        data.parallel(lambda x: 1 / x, [1, 0], num_workers=2)
    with pytest.raises(ValueError, match="num_workers must be at least 0 or None, got -1"):
        data.parallel(abs, [], num_workers=-1)
    with pytest.raises(ValueError, match="kind must be 'thread' or 'process', got 'gpu'"):
        data.parallel(abs, [], kind="gpu")
