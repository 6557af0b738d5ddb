"""Sets drawn from a key, and texts as labels: what they hold, that they repeat, and what they refuse."""

import pytest
import torch

from holofunc import data, random

FONT = data.find_fonts("holofunc")[0]


# --- shapes ------------------------------------------------------------------------------------------------------


def test_shapes_repeat_and_longer_sets_begin_with_shorter_ones():
    first, longer = data.draw_shapes(random.key(0), 3, size=32), data.draw_shapes(random.key(0), 5, size=32)
    torch.manual_seed(3)  # the global generator has no part in it
    for a, b in zip(first, longer, strict=True):
        assert torch.equal(a, b[:3])
    assert not torch.equal(first.images, data.draw_shapes(random.key(1), 3, size=32).images)


def test_masks_boxes_and_labels_tell_the_same():
    drawn = data.draw_shapes(random.key(0), 40, size=48)
    assert (drawn.images.dtype, drawn.masks.dtype, drawn.labels.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert set(drawn.present.sum(1).tolist()) == {1, 2, 3}
    assert not drawn.boxes[~drawn.present].any()
    assert not drawn.labels[~drawn.present].any()
    columns = torch.arange(48)
    for mask, boxes, labels, present in zip(*drawn[1:], strict=True):
        assert set((labels[present] + 1).tolist()) <= set(mask.unique().tolist())
        for (x1, y1, x2, y2), label in zip((boxes[present] * 48).tolist(), labels[present].tolist(), strict=True):
            inside = (columns >= x1) & (columns < x2) & ((columns >= y1) & (columns < y2))[:, None]
            assert 0 <= x1 < x2 <= 48
            assert 0 <= y1 < y2 <= 48
            own = (mask == label + 1) & inside
            for side in (own[:, int(x1)], own[:, int(x2) - 1], own[int(y1)], own[int(y2) - 1]):
                assert side.any()  # the box is no larger than it must be


def test_classes_are_as_frequent_and_look_as_they_are_called():
    drawn = data.draw_shapes(random.key(1), 200, size=32, most=1)
    counts = drawn.labels.flatten().bincount()
    assert counts.min() > 30
    share = [  # of its box that a shape fills, whatever its angle
        ((drawn.masks > 0).sum((1, 2)) / (1024 * (drawn.boxes[:, 0, 2:] - drawn.boxes[:, 0, :2]).prod(1)))[of].mean()
        for of in (drawn.labels[:, 0] == label for label in range(4))
    ]
    disc, square, triangle, cross = share
    assert disc > square > cross > triangle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"size": 8}, "size must be an integer of at least 16, got 8"),
        ({"most": 0}, "most must be an integer of at least 1, got 0"),
    ],
)
def test_shapes_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        data.draw_shapes(random.key(0), **{"count": 2, **options})


# --- codec -------------------------------------------------------------------------------------------------------


def test_texts_survive_encoding():
    codec = data.CTCCodec("ab é")
    words = ["", "a", "éé a", "bb"]
    assert codec.texts(codec.encode_all(words)) == words
    assert codec.encode_all(words, 6).shape == (4, 6)
    assert codec.encode_all([""]).tolist() == [[-100]]
    assert (len(codec), repr(codec)) == (4, "CTCCodec('ab é')")


def test_paths_are_merged():
    codec = data.CTCCodec("ab")
    assert codec.decode(torch.tensor([1, 1, 0, 1, 2, 2, 0, 0])) == "aab"
    assert codec.decode([]) == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.CTCCodec(""), "alphabet must hold characters that can be printed, each once, got none"),
        (lambda: data.CTCCodec("aba"), r"each once, got \['a'\] twice"),
        (lambda: data.CTCCodec("a\n"), r"got \['\\n'\], which cannot be printed"),
        (lambda: data.CTCCodec("abc").encode("cad"), r"text 'cad' has characters that are not in the alphabet 'abc': \['d'\]"),
        (lambda: data.CTCCodec("abc").encode_all(["a", "abc"], 2), "texts must have at most length=2 characters, got 'abc'"),
        (lambda: data.CTCCodec("abc").encode_all([]), "texts must hold at least one text, got none"),
        (lambda: data.CTCCodec("abc").decode([4]), r"labels must be in \[0, 3\], got 4"),
        (lambda: data.CTCCodec("abc").texts(torch.tensor([[-1]])), r"labels must be in \[0, 3\], got -1"),
    ],
)  # fmt: skip
def test_codec_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_text_is_not_several():
    with pytest.raises(TypeError, match="texts must be several, got 'abc'"):
        data.CTCCodec("abc").encode_all("abc")


# --- fonts and lines ---------------------------------------------------------------------------------------------


def test_fonts_are_there_and_have_the_glyphs():
    assert set(data.find_fonts("é")) <= set(data.find_fonts("e") + data.find_fonts("é"))
    assert set(data.find_fonts("ab c")) <= set(data.find_fonts())
    assert data.find_fonts("\U000f1234") == ()


def test_rendered_texts_are_tight_and_colored():
    white, padded = data.render_text("holofunc", FONT, size=20), data.render_text("holofunc", FONT, size=20, padding=3)
    assert torch.equal(padded[:, 3:-3, 3:-3], white)
    assert all(side.any() for side in (white[0, 0], white[0, -1], white[0, :, 0], white[0, :, -1]))
    black = data.render_text("holofunc", FONT, size=20, background=255, color=0)
    assert torch.equal(black, 255 - white)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " "}, "text must leave a mark, got ' '"),
        ({"text": "a\U000f1234"}, "has no glyph for"),
        ({"color": 0}, r"background and color must differ and be in \[0, 255\], got 0 and 0"),
        ({"color": 256}, "got 0 and 256"),
        ({"padding": -1}, "padding must be at least 0 and size at least 1, got padding=-1"),
    ],
)
def test_rendering_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        data.render_text(**{"text": "a", "font": FONT, **options})


def test_lines_repeat_and_longer_sets_begin_with_shorter_ones():
    images, texts = data.draw_text_lines(random.key(0), 3, size=(32, 64), length=(1, 4))
    longer, more = data.draw_text_lines(random.key(0), 5, size=(32, 64), length=(1, 4))
    assert images.shape == (3, 1, 32, 64)
    assert torch.equal(images, longer[:3])
    assert texts == more[:3]
    assert data.draw_text_lines(random.key(1), 3, size=(32, 64), length=(1, 4))[1] != texts


def test_lines_have_the_lengths_asked_for_and_can_be_seen():
    images, texts = data.draw_text_lines(random.key(0), 60, "ab", length=(2, 5))
    assert {len(text) for text in texts} == {2, 3, 4, 5}
    assert set("".join(texts)) == {"a", "b"}
    middle = torch.nn.functional.avg_pool2d(images.float(), 3, 1).flatten(1)  # without the grain
    assert (middle.amax(1) - middle.amin(1)).min() > 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count and length must be at least 1.*got count=0"),
        ({"length": (3, 2)}, r"length=\(3, 2\)"),
        ({"alphabet": ""}, "alphabet=''"),
        ({"fonts": []}, "fonts must have a glyph for each of 'ab', got none"),
        ({"alphabet": "\U000f1234"}, "fonts must have a glyph for each of"),
    ],
)
def test_lines_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        data.draw_text_lines(random.key(0), **{"count": 2, "alphabet": "ab", **options})
