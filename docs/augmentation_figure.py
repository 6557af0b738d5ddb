"""Draw the picture of docs/augmentation.md: `python docs/augmentation_figure.py`."""

import io
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from holofunc import data, random, transforms
from holofunc.plots import drawing

FILE = Path(__file__).parent / "img/augmentation.png"


def rows() -> dict[str, tuple[Tensor, Tensor | None]]:
    """Four images per augmentation, and boxes where there are some."""
    digits, labels = data.digits("train")
    images = torch.as_tensor(digits[:4]).float().reshape(4, 1, 8, 8)
    images = F.interpolate(images / images.max(), size=48, mode="bilinear").expand(4, 3, 48, 48)
    images = (
        images * torch.tensor([[1.0, 0.5, 0.2], [0.3, 0.8, 0.4], [0.3, 0.5, 1.0], [0.9, 0.3, 0.7]])[..., None, None]
    )
    labels = torch.as_tensor(labels[:4])
    boxes = torch.tensor([[[0.1, 0.05, 0.9, 0.95]]] * 4), labels[:, None], torch.ones(4, 1, dtype=torch.bool)
    key, found = random.key(5), {}
    for name, augment in {
        "random_resized_crop": transforms.random_resized_crop(scale=(0.3, 0.9)),
        "zoom_out": transforms.zoom_out(1.0, max_scale=2.5),
        "large_scale_jitter": transforms.large_scale_jitter(scale=(0.5, 1.6)),
        "mosaic": transforms.mosaic(),
    }.items():
        seen, (places, _, mask) = augment((images, boxes), key)
        found[name] = seen, torch.where(mask[..., None], places, torch.nan)
    for name, augment in {
        "color_jitter": transforms.color_jitter(brightness=0.5, contrast=0.3, saturation=0.5, hue=0.3),
        "random_erasing": transforms.random_erasing(1.0),
        "rand_augment": transforms.rand_augment(2, 15.0),
        "mixup": transforms.mixup(10, 1.0),
        "cutmix": transforms.cutmix(10),
    }.items():
        found[name] = augment((images, labels), key)[0], None
    return {"images": (images, None), **found}


def main(file: Path = FILE) -> None:
    """Draw a row of four for each."""
    with matplotlib.rc_context(drawing.STYLE):
        shown = rows()
        figure = Figure(figsize=(7, 1.1 * ((len(shown) + 1) // 2)), layout="constrained")
        grids = figure.subplots((len(shown) + 1) // 2, 8, squeeze=False)
        for i, (name, (images, boxes)) in enumerate(shown.items()):
            cells = grids[i // 2][4 * (i % 2) : 4 * (i % 2) + 4]
            cells[0].set_title(name)
            for j, (axes, image) in enumerate(zip(cells, images, strict=True)):
                axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
                axes.set(xticks=[], yticks=[])
                for x1, y1, x2, y2 in [] if boxes is None else (boxes[j] * 48 - 0.5).tolist():
                    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1))
        picture = io.BytesIO()
        figure.savefig(picture, dpi=130)
        with Image.open(picture) as image:  # 256 colours: half the size
            image.convert("RGB").quantize(256).save(file, optimize=True)


if __name__ == "__main__":
    main()
