"""Text: codecs between characters and labels, fonts, and synthetic images of text lines."""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from holofunc import random
from holofunc.ops.ctc import PADDING
from holofunc.typing import Key

__all__ = ["CTCCodec", "draw_text_lines", "find_fonts", "render_text"]


class CTCCodec:
    """A codec between characters and CTC labels: 0 is the blank, 1 the first character of the alphabet.

    Args:
        alphabet: its characters, each once.

    Raises:
        ValueError: no characters, one that is there twice, or one that cannot be printed.

    Example:
        >>> from holofunc import data
        >>> codec = data.CTCCodec("abc")
        >>> codec.encode("cab"), codec.encode_all(["a", "bc"])
        (tensor([3, 1, 2]), tensor([[   1, -100],
                                    [   2,    3]]))
        >>> codec.decode([0, 3, 3, 0, 1, 2, 0, 2]), codec.texts(codec.encode_all(["aab", ""]))
        ('cabb', ['aab', ''])
    """

    def __init__(self, alphabet: str) -> None:
        twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
        unprintable = sorted({c for c in alphabet if not c.isprintable()})
        if not alphabet or twice or unprintable:
            problem = (
                f"{twice} twice" if twice else f"{unprintable}, which cannot be printed" if unprintable else "none"
            )
            raise ValueError(f"alphabet must hold characters that can be printed, each once, got {problem}")
        self.alphabet = alphabet
        self._labels = {c: i for i, c in enumerate(alphabet, 1)}

    def __len__(self) -> int:
        """Number of characters, the ``num_classes`` of a recognizer."""
        return len(self.alphabet)

    def __repr__(self) -> str:
        return f"CTCCodec({self.alphabet!r})"

    def encode(self, text: str) -> Tensor:
        """The labels of a text, int64 (L,).

        Raises:
            TypeError: no text. ValueError: a character that is not in the alphabet.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise ValueError(f"text {text!r} has characters that are not in the alphabet {self.alphabet!r}: {unknown}")
        return torch.tensor([self._labels[c] for c in text], dtype=torch.int64)

    def encode_all(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """The labels of texts, int64 (N, L), padded at the end as `holofunc.losses.ctc` takes them.

        Args:
            texts: at least one.
            length: L; by default that of the longest text, and at least 1.

        Raises:
            TypeError: a single text. ValueError: no texts, a longer text than ``length``, or a character that is not in
                the alphabet.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be several, got {texts!r}")
        longest = max(texts, key=len, default=None)
        if longest is None:
            raise ValueError("texts must hold at least one text, got none")
        length = max(len(longest), 1) if length is None else length
        if len(longest) > length:
            raise ValueError(f"texts must have at most length={length} characters, got {longest!r}")
        return torch.stack([F.pad(self.encode(text), (0, length - len(text)), value=PADDING) for text in texts])

    def decode(self, path: Tensor | Iterable[int]) -> str:
        """The text of one class for each frame: repeats merged, then blanks dropped.

        Raises:
            ValueError: a class that is none.
        """
        labels = [int(label) for label in path]
        return self._text([label for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]])

    def texts(self, labels: Tensor) -> list[str]:
        """The texts of rows of labels (N, L), padded at the end, as decoders return them: repeats are characters.

        Raises:
            ValueError: a label that is none.
        """
        return [self._text([label for label in row if label != PADDING]) for row in labels.tolist()]

    def _text(self, labels: list[int]) -> str:
        if wrong := [label for label in labels if not 0 <= label <= len(self)]:
            raise ValueError(f"labels must be in [0, {len(self)}], got {wrong[0]}")
        return "".join(self.alphabet[label - 1] for label in labels if label)


# --- fonts -------------------------------------------------------------------------------------------------------


@functools.cache
def find_fonts(text: str | None = None) -> tuple[str, ...]:
    """The paths of the installed fonts and of those that come with matplotlib, sorted.

    Args:
        text: only fonts with a glyph for each of its characters.

    Example:
        >>> from holofunc import data
        >>> [path.rpartition("/")[2] for path in data.find_fonts("abc") if "DejaVuSansMono-" in path][:1]
        ['DejaVuSansMono-Bold.ttf']
    """
    found = (path for folder in _font_folders() if folder.is_dir() for path in folder.rglob("*.[to]t[fc]"))
    paths = [path for path in found if "LastResort" not in path.name]  # which has a placeholder for everything
    fonts = {str(path): _loaded(str(path)) for path in sorted(set(paths))}
    return tuple(path for path, font in fonts.items() if font is not None and (text is None or _has(font, text)))


def _font_folders() -> list[Path]:
    home = Path.home()
    folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]
    if sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    elif sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    return [*folders, _matplotlib_fonts()]


def _matplotlib_fonts() -> Path:
    """A folder of fonts that is there wherever this package is; matplotlib is not imported for it."""
    spec = importlib.util.find_spec("matplotlib")
    return Path(spec.origin or "").parent / "mpl-data/fonts/ttf" if spec else Path("nowhere")


def _loaded(path: str, size: int = 20) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, size)
    except (OSError, ValueError):  # bitmaps, and formats that FreeType was built without
        return None


def _has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    try:
        missing = bytes(font.getmask("\U0010ffff"))  # a code that is no character: its glyph stands for missing ones
        return all(c.isspace() or _marks(font, c) not in (b"", missing) for c in text)
    except OSError:
        return False


def _marks(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    mask = font.getmask(character)
    return bytes(mask) if mask.getbbox() else b""


def render_text(
    text: str, font: str | Path | ImageFont.FreeTypeFont, *, size: int = 24, padding: int = 0,
    background: int = 0, color: int = 255,
) -> Tensor:  # fmt: skip
    """A grey image of a text, of the smallest size that contains it.

    Args:
        text: at least one character that leaves a mark.
        font: a path, like those of `find_fonts`, or a font of Pillow, which has its own size.
        size: of a font given by its path.
        padding: pixels of background on all sides, at least 0.
        background: in [0, 255].
        color: of the text, in [0, 255], other than the background.

    Returns:
        uint8 of shape (1, H, W).

    Raises:
        ValueError: nothing to see in the text, a character without a glyph, or a number out of range.

    Example:
        >>> from holofunc import data
        >>> font = data.find_fonts("holofunc")[0]
        >>> image = data.render_text("holofunc", font, padding=2)
        >>> image.shape[0], image[:, :2].max().item(), image.max().item()
        (1, 0, 255)
    """
    if not 0 <= background <= 255 or not 0 <= color <= 255 or background == color:
        raise ValueError(f"background and color must differ and be in [0, 255], got {background} and {color}")
    if padding < 0 or size < 1:
        raise ValueError(f"padding must be at least 0 and size at least 1, got padding={padding}, size={size}")
    loaded = font if isinstance(font, ImageFont.FreeTypeFont) else ImageFont.truetype(str(font), size)
    mask = loaded.getmask(text)
    box = mask.getbbox()
    if box is None:
        raise ValueError(f"text must leave a mark, got {text!r}")
    if missing := sorted({c for c in text if not _has(loaded, c)}):
        raise ValueError(f"text {text!r} has characters that {loaded.getname()[0]} has no glyph for: {missing}")
    width, height = mask.size
    pixels = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)[box[1] : box[3], box[0] : box[2]]
    image = torch.from_numpy(background + (pixels / 255.0) * (color - background)).round().to(torch.uint8)
    return F.pad(image, [padding] * 4, value=background)[None]


# --- lines of text -----------------------------------------------------------------------------------------------


def draw_text_lines(
    key: Key,
    count: int,
    alphabet: str = "0123456789abcdefghijklmnopqrstuvwxyz",
    *,
    length: tuple[int, int] = (3, 8),
    size: tuple[int, int] = (32, 128),
    fonts: Sequence[str] | None = None,
) -> tuple[Tensor, list[str]]:
    """Draw images of random words in random fonts, sizes, positions and contrasts, slanted and noisy.

    Args:
        key: texts and images are a function of it (and of Pillow's renderer), each of its own number: a longer set
            begins with a shorter one.
        count: N, at least 1.
        alphabet: characters, each as frequent.
        length: least and most characters of a word.
        size: height and width of the images; a word that is too wide for its font is drawn smaller.
        fonts: paths; by default, the eight of DejaVu Sans that come with matplotlib.

    Returns:
        ``(images, texts)``: uint8 of shape (N, 1, H, W), and N strings.

    Raises:
        ValueError: a number out of range, no fonts, or a font without a glyph for each character.

    Example:
        >>> from holofunc import data, random
        >>> images, texts = data.draw_text_lines(random.key(0), 3, "0123456789")
        >>> images.shape, texts
        (torch.Size([3, 1, 32, 128]), ['37372', '5012', '26985636'])
    """
    fewest, most = length
    if count < 1 or not 1 <= fewest <= most or not alphabet or min(size) < 8:
        raise ValueError(
            "count and length must be at least 1, alphabet must hold a character and size 8 pixels, got "
            f"count={count}, length={length}, alphabet={alphabet!r}, size={size}"
        )
    fonts = _default_fonts() if fonts is None else fonts
    lacking = [path for path in fonts if not _has_all(path, alphabet)]
    if lacking or not fonts:
        raise ValueError(f"fonts must have a glyph for each of {alphabet!r}, got {lacking or 'none'}")
    keys = torch.stack([random.fold_in(key, i) for i in range(count)])

    def draws(key: Key) -> tuple[Tensor, ...]:
        number, letters, look, noise = random.split(key, 4).unbind()
        chosen = random.randint(letters, (most,), 0, len(alphabet))
        return random.randint(number, (), fewest, most + 1), chosen, random.uniform(look, (8,)), _noise(noise, size)

    numbers, letters, looks, noises = torch.vmap(draws)(keys)
    texts = [
        "".join(alphabet[i] for i in row[:number])
        for row, number in zip(letters.tolist(), numbers.tolist(), strict=True)
    ]
    marks = torch.from_numpy(
        np.stack([_line(text, look, size, fonts) for text, look in zip(texts, looks.tolist(), strict=True)])
    )
    dark, bright = 90 * looks[:, 6], 255 - 90 * looks[:, 7]
    ground, ink = torch.where(looks[:, 5] < 0.5, bright, dark), torch.where(looks[:, 5] < 0.5, dark, bright)
    share = (marks / 255.0)[:, None]
    column = [-1, 1, 1, 1]
    images = ground.view(column) * (1 - share) + ink.view(column) * share + noises
    return images.clamp(0, 255).round().to(torch.uint8), texts


@functools.cache
def _default_fonts() -> tuple[str, ...]:
    return tuple(
        str(path) for path in sorted(_matplotlib_fonts().glob("DejaVuSans*.ttf")) if "Display" not in path.name
    )


@functools.cache
def _has_all(path: str, text: str) -> bool:
    font = _loaded(path)
    return font is not None and _has(font, text)


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _noise(key: Key, size: tuple[int, int]) -> Tensor:
    """A slow change of the light and a grain, (1, H, W)."""
    light, grain = random.split(key).unbind()
    slow = F.interpolate(random.uniform(light, (1, 1, 2, 5), low=-30.0, high=30.0), size=size, mode="bilinear")[0]
    return slow + random.uniform(grain, (1, *size), low=-20.0, high=20.0)


def _line(text: str, look: list[float], size: tuple[int, int], fonts: Sequence[str]) -> np.ndarray:
    """A text as the share of ink in each pixel, uint8 (H, W)."""
    height, width = size
    path = fonts[min(int(look[0] * len(fonts)), len(fonts) - 1)]
    points = round(height * (0.5 + 0.28 * look[1]))
    while points > 6 and _font(path, points).getlength(text) > 0.88 * width:
        points -= 1
    font = _font(path, points)
    left, top, right, bottom = font.getbbox(text)
    x = 0.05 * width + look[2] * max(0.9 * width - (right - left), 0) - left  # a margin for the slant
    y = 1 + look[3] * max(height - 2 - (bottom - top), 0) - top
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((x, y), text, fill=255, font=font)
    slant = 0.5 * (look[4] - 0.5)
    bent = image.transform(
        image.size, Image.Transform.AFFINE, (1, slant, -slant * height / 2, 0, 1, 0), Image.Resampling.BILINEAR
    )
    return np.asarray(bent)
