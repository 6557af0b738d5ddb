"""Decoding: the definitions by enumeration, Holocron as an oracle, and texts that distances are known of."""

import itertools
import math
import warnings

import pytest
import torch

from holofunc import random
from holofunc.ops import ctc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class while it is imported
    from holocron.utils import CTCCodec, prefix_beam_decode


def log_probs(seed, frames, num, classes, sharpness=2.0):
    return torch.log_softmax(
        sharpness * random.normal(random.key(seed), (frames, num, classes), dtype=torch.float64), -1
    )


def merged(path, blank=0):
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


def texts(decoded):
    return [tuple(row[:n].tolist()) for row, n in zip(decoded.labels, decoded.lengths, strict=True)]


@pytest.mark.parametrize("blank", [0, 2])
def test_greedy_is_the_most_probable_path(blank):
    scores, lengths = log_probs(0, 12, 5, 4), torch.tensor([12, 7, 1, 0, 9])
    decoded = ctc.greedy_decode(scores, lengths, blank=blank)
    paths = [scores[:n, i].argmax(-1).tolist() for i, n in enumerate(lengths.tolist())]
    assert texts(decoded) == [merged(path, blank) for path in paths]
    assert all((row[n:] == ctc.PADDING).all() for row, n in zip(decoded.labels, decoded.lengths, strict=True))
    expected = torch.stack([scores[:n, i].amax(-1).sum() for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(decoded.scores, expected)


@pytest.mark.parametrize("blank", [0, 2])
def test_a_wide_beam_finds_the_most_probable_text_and_its_probability(blank):
    scores, lengths = log_probs(1, 5, 6, 3, sharpness=0.7), torch.tensor([5, 5, 4, 3, 1, 0])
    decoded = ctc.prefix_beam_decode(scores, lengths, beam_width=100, blank=blank)
    for i, n in enumerate(lengths.tolist()):
        totals = {}
        for path in itertools.product(range(3), repeat=n):
            probability = sum(float(scores[t, i, k]) for t, k in enumerate(path))
            totals[merged(path, blank)] = totals.get(merged(path, blank), 0) + torch.tensor(probability).exp()
        best = max(totals, key=totals.get)
        assert texts(decoded)[i] == best
        torch.testing.assert_close(decoded.scores[i].exp(), totals[best].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("width", "topk"), [(1, None), (3, None), (8, None), (4, 2), (5, 1)])
def test_beams_are_holocrons(width, topk):
    alphabet = "abcdef"
    scores = log_probs(2, 14, 20, 1 + len(alphabet), sharpness=1.0)
    decoded = ctc.prefix_beam_decode(scores, beam_width=width, token_topk=topk)
    for i, labels in enumerate(texts(decoded)):
        theirs = prefix_beam_decode(
            scores[:, i].numpy(), CTCCodec(alphabet), beam_width=width, token_topk=topk or len(alphabet)
        )
        assert "".join(alphabet[k - 1] for k in labels) == theirs


def searched(scores, width):
    """A beam search whose prefixes are the keys of a dictionary."""
    beams = {(): (0.0, -math.inf)}  # log-probabilities that it ends in a blank, or in its last label
    for frame in scores.tolist():
        grown = {}
        for prefix, (in_blank, in_label) in beams.items():
            for k, p in enumerate(frame):
                again = k > 0 and prefix[-1:] == (k,)
                paths = [(prefix, 0, add(in_blank, in_label) + p)] if k == 0 else [
                    ((*prefix, k), 1, (in_blank if again else add(in_blank, in_label)) + p)
                ]  # fmt: skip
                paths += [(prefix, 1, in_label + p)] if again else []
                for text, end, mass in paths:
                    old = grown.get(text, (-math.inf, -math.inf))
                    grown[text] = tuple(add(x, mass) if i == end else x for i, x in enumerate(old))
        beams = dict(sorted(grown.items(), key=lambda item: -add(*item[1]))[:width])
    return max(beams, key=lambda text: add(*beams[text]))


def add(a, b):
    return float(torch.tensor([a, b], dtype=torch.float64).logsumexp(0))


@pytest.mark.parametrize("width", [2, 3, 5, 9])
def test_beams_that_are_not_all_taken_yet_hold_no_copies(width):
    """With few classes, there are fewer prefixes than places in the first frames."""
    scores = log_probs(5, 8, 30, 3, sharpness=0.5)
    decoded = ctc.prefix_beam_decode(scores, beam_width=width)
    assert texts(decoded) == [searched(scores[:, i], width) for i in range(30)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_single(dtype):
    scores = log_probs(6, 6, 4, 5).to(dtype)
    for decode in (ctc.greedy_decode, ctc.prefix_beam_decode):
        for half, single in zip(decode(scores), decode(scores.float()), strict=True):
            assert torch.equal(half, single)
            assert half.dtype == single.dtype


@pytest.mark.parametrize("decode", [ctc.greedy_decode, ctc.prefix_beam_decode])
def test_padding_and_company_do_not_matter(decode):
    scores, lengths = log_probs(3, 9, 4, 4), torch.tensor([9, 6, 2, 4])
    together = decode(scores, lengths)
    noise = torch.where(torch.arange(9)[:, None, None] < lengths[:, None], scores, float("nan"))
    for i, n in enumerate(lengths.tolist()):
        alone = decode(scores[:n, i : i + 1])
        assert texts(alone) == [texts(together)[i]]
        torch.testing.assert_close(alone.scores[0], together.scores[i])
    assert texts(decode(noise.nan_to_num(-1e9), lengths)) == texts(together)


@pytest.mark.parametrize("decode", [ctc.greedy_decode, ctc.prefix_beam_decode])
def test_compiled_and_mapped(decode):
    scores, lengths = log_probs(4, 6, 3, 4), torch.tensor([6, 3, 5])
    expected = decode(scores, lengths)
    for function in (
        torch.compile(decode, fullgraph=True, backend="eager"),
        lambda x, n: ctc.Decoded(
            *(y[:, 0] for y in torch.vmap(lambda x, n: decode(x[:, None], n[None]), (1, 0))(x, n))
        ),
    ):
        for actual, wanted in zip(function(scores, lengths), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_impossible_classes_do_no_harm():
    scores = torch.full((4, 1, 3), -torch.inf)
    scores[torch.arange(4), 0, torch.tensor([1, 0, 1, 2])] = 0.0
    for decode in (ctc.greedy_decode, ctc.prefix_beam_decode):
        decoded = decode(scores)
        assert texts(decoded) == [(1, 1, 2)]
        assert decoded.scores.item() == 0


# --- distance ----------------------------------------------------------------------------------------------------


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


def padded(words, length):
    rows = torch.full((len(words), length), ctc.PADDING)
    for row, word in zip(rows, words, strict=True):
        row[: len(word)] = torch.tensor([ord(c) for c in word], dtype=torch.int64)
    return rows


def test_distances_that_are_known():
    pairs = [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("aa", "a", 1)]
    a, b, expected = zip(*pairs, strict=True)
    assert ctc.edit_distance(padded(a, 8), padded(b, 7)).tolist() == list(expected)


def test_distances_of_many():
    lengths = random.randint(random.key(0), (2, 200), 0, 9).tolist()
    letters = random.randint(random.key(1), (2, 200, 9), 97, 100).tolist()
    a, b = (
        [bytes(row[:n]).decode() for row, n in zip(*both, strict=True)] for both in zip(letters, lengths, strict=True)
    )
    forth, back = ctc.edit_distance(padded(a, 9), padded(b, 9)), ctc.edit_distance(padded(b, 9), padded(a, 9))
    assert forth.tolist() == [levenshtein(x, y) for x, y in zip(a, b, strict=True)]
    assert torch.equal(forth, back)
    mapped = torch.vmap(lambda x, y: ctc.edit_distance(x[None], y[None])[0])(padded(a, 9), padded(b, 9))
    assert torch.equal(mapped, forth)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ctc.greedy_decode(torch.zeros(3, 2)), r"log_probs must have shape \(T, N, K\) with T at least 1, got \(3, 2\)"),
        (lambda: ctc.greedy_decode(torch.zeros(3, 2, 4), torch.tensor([1])), r"lengths must have shape \(2,\), one for each sequence, got \(1,\)"),
        (lambda: ctc.greedy_decode(torch.zeros(3, 2, 4), torch.tensor([1, 4])), r"lengths must be in \[0, 3\], got 1 to 4"),
        (lambda: ctc.prefix_beam_decode(torch.zeros(3, 2, 4), blank=4), r"blank must be in \[0, 4\), got 4"),
        (lambda: ctc.prefix_beam_decode(torch.zeros(3, 2, 4), beam_width=0), "beam_width must be an integer of at least 1, got 0"),
        (lambda: ctc.prefix_beam_decode(torch.zeros(3, 2, 4), token_topk=4), "token_topk must be at most 3, the number of labels, got 4"),
        (lambda: ctc.edit_distance(torch.zeros(3), torch.zeros(3)), r"labels and targets must have shapes \(N, T\) and \(N, L\)"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
