"""Reading of image files and PIL images, in one place."""

from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["plain", "read"]


def read(path: str | Path, mode: str = "RGB", *, upright: bool = True) -> Image.Image:
    """Read an image file.

    Args:
        path: of the file.
        mode: of the result, ``"RGB"`` or ``"L"``.
        upright: whether to apply the EXIF rotation; not for images with a mask or another file with the same pixels.

    Raises:
        ValueError: with the path, if the file is not an image, is broken, has more than 8 bits per channel, or more
            pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise ValueError(f"it has more than {most:,} pixels, {image.width} x {image.height}")
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            image.load()
            return plain(ImageOps.exif_transpose(image) if upright else image).convert(mode)
    except Exception as error:  # broken files make decoders raise all kinds of exceptions
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error


def plain(image: Image.Image) -> Image.Image:
    """Convert palette and binary images, whose pixels are indices, to colours.

    Example:
        >>> from PIL import Image
        >>> plain(Image.new("P", (2, 2))).mode, plain(Image.new("1", (2, 2))).mode, plain(Image.new("L", (2, 2))).mode
        ('RGB', 'L', 'L')
    """
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # the palette may hold transparency
    return image.convert("L") if image.mode == "1" else image
