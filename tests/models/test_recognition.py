"""Recognizers: equal to Holocron's by name and number, blind to padding, and what they refuse."""

import json
import lzma
import warnings
from pathlib import Path

import pytest
import torch

from holofunc import losses, models, random
from holofunc.ops import ctc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class while it is imported
    from holocron.models.recognition import CharacterClassifier, CTCRecognizer

FILE = Path(__file__).parents[1] / "data/holocron_unets_and_recognizers.json.xz"
NAMES = json.loads(lzma.decompress(FILE.read_bytes()))
THEIRS = {"ctc_recognizer": CTCRecognizer, "character_classifier": CharacterClassifier}
LENGTHS = torch.tensor([16, 9, 1])


def start(name, dtype=torch.float64, **options):
    model = models.create(name, num_classes=5, **options)
    params, buffers = model.init(random.key(0), dtype=dtype)
    buffers = {n: b - 0.05 if n.endswith("mean") else b for n, b in buffers.items()}
    return model, params, buffers, random.normal(random.key(2), (3, 1, 32, 64), dtype=dtype)


def of_image(name, out):
    """Outputs with the images first."""
    return out.transpose(0, 1) if name == "ctc_recognizer" else out


# --- Holocron ----------------------------------------------------------------------------------------------------


def test_both_are_listed():
    assert models.list_models(task="recognition") == sorted(THEIRS)
    assert [row.params for row in models.table(task="recognition")] == [139_378, 484_147]


@pytest.mark.parametrize("name", THEIRS)
def test_names_order_and_shapes(name):
    skeleton = models.create(name, num_classes=10).skeleton
    assert [[n, list(v.shape)] for n, v in skeleton.state_dict().items()] == NAMES[THEIRS[name].__name__]


@pytest.mark.parametrize("name", THEIRS)
def test_outputs_and_statistics(name):
    theirs = THEIRS[name](num_classes=5).double()
    for n, value in theirs.state_dict().items():
        if n.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    params, buffers = models.surgery.load(
        models.create(name, num_classes=5), {n: v.clone() for n, v in theirs.state_dict().items()}
    )
    if name == "ctc_recognizer":
        theirs.context.dropout = 0.0
    model = models.create(name, num_classes=5, **({"dropout": 0.0} if name == "ctc_recognizer" else {}))
    _, _, _, x = start(name)
    for train in (False, True):
        for lengths in (LENGTHS, torch.full((3,), 16)):
            out, new = model.apply(params, buffers, x, lengths, train=train)
            with torch.no_grad():
                torch.testing.assert_close(out, theirs.train(train)(x, lengths), rtol=0, atol=1e-12)
            if train:
                theirs.load_state_dict({**params, **buffers})  # as it was before this pass
    assert (out - model.apply(params, buffers, x, train=True)[0]).abs().max() < 1e-12  # no lengths: all of the width
    assert not torch.equal(new["backbone.features.1.running_mean"], buffers["backbone.features.1.running_mean"])


def test_a_classifiers_backbone_serves_the_recognizer():
    params, _ = models.character_classifier().init(random.key(0))
    other, _ = models.ctc_recognizer().init(random.key(1))
    backbone = {n: p for n, p in params.items() if n.startswith("backbone.")}
    assert backbone.keys() == {n for n in other if n.startswith("backbone.")}


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
def test_a_padded_image_gives_what_it_gives_alone(name):
    model, params, buffers, x = start(name, masked=True)
    together = of_image(name, model.apply(params, buffers, x, LENGTHS)[0])
    noise = torch.where(torch.arange(64) < 4 * LENGTHS[:, None, None, None], x, 7.0)
    torch.testing.assert_close(of_image(name, model.apply(params, buffers, noise, LENGTHS)[0]), together)
    for image, length, expected in zip(x, LENGTHS, together, strict=True):
        alone = of_image(name, model.apply(params, buffers, image[None, :, :, : 4 * length], length[None])[0])[0]
        torch.testing.assert_close(alone, expected[:length] if name == "ctc_recognizer" else expected)


def test_the_context_of_a_frame_is_the_whole_text_and_nothing_else():
    model, params, buffers, x = start("ctc_recognizer", masked=True)
    for frame in (0, 8):
        seen = torch.func.grad(lambda x, t=frame: model.apply(params, buffers, x, LENGTHS)[0][t, 1].square().sum())(x)
        assert seen[1, 0, :, :36].abs().sum(0).min() > 0
        assert not seen[1, 0, :, 36:].any()
        assert not seen[0].any()


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
def test_a_start_is_a_function_of_the_key(name):
    first, again, other = (models.create(name).init(random.key(seed))[0] for seed in (0, 0, 1))
    torch.manual_seed(3)  # the global generator has no part in it
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n, p in first.items() if p.ndim > 1)
    assert all(t.is_meta for t in models.create(name).skeleton.state_dict().values())


def test_the_recognizer_draws_between_its_layers():
    model, params, buffers, x = start("ctc_recognizer")
    with pytest.raises(ValueError, match=r"draws random numbers in [\w.]+: key must be given"):
        model.apply(params, buffers, x, LENGTHS, train=True)
    first, again, other = (
        model.apply(params, buffers, x, LENGTHS, train=True, key=random.key(k))[0] for k in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", THEIRS)
def test_per_sample_gradients_and_tangents_reach_every_parameter(name):
    model, params, buffers, x = start(name)

    def loss(params, image, length):
        return model.apply(params, buffers, image[None], length[None])[0].square().mean()

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, LENGTHS)
    for i in (0, 1):
        expected = torch.func.grad(loss)(params, x[i], LENGTHS[i])
        for n in params:
            torch.testing.assert_close(by_sample[n][i], expected[n], rtol=1e-7, atol=1e-10)
            assert by_sample[n].any(), n
    tangent = {n: random.normal(random.key(3), p.shape, dtype=p.dtype) for n, p in params.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x[1], LENGTHS[1]), (params,), (tangent,))
    torch.testing.assert_close(slope, sum((expected[n] * tangent[n]).sum() for n in params), rtol=1e-7, atol=1e-10)


def test_a_training_gradient_is_one_graph():
    torch.compiler.reset()
    model, params, buffers, x = start("ctc_recognizer")
    targets = torch.tensor([[1, 2], [3, 3], [4, -100]])

    def gradient(params, x, lengths, key):
        def loss(params):
            log_probs, _ = model.apply(params, buffers, x, lengths, train=True, key=key)
            return losses.ctc(log_probs, targets, input_lengths=lengths)

        return torch.func.grad(loss)(params)

    expected = gradient(params, x[..., :12], LENGTHS.clamp(max=3), random.key(4))
    assert all(g.isfinite().all() for g in expected.values())
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params, x[..., :12], LENGTHS.clamp(max=3), random.key(4)), expected)


@pytest.mark.parametrize("name", ["character_classifier", pytest.param("ctc_recognizer", marks=pytest.mark.slow)])
def test_ordinary_modules_and_exported_programs_compute_the_same(name):
    model, params, buffers, x = start(name, torch.float32)
    expected, _ = model.apply(params, buffers, x, LENGTHS)
    module = model.to_module(params, buffers)
    torch.testing.assert_close(module(x, LENGTHS), expected)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (x, LENGTHS), dynamic_shapes=(batch, batch))
    torch.testing.assert_close(of_image(name, program.module()(x[:2], LENGTHS[:2])), of_image(name, expected)[:2])


def test_reading_and_its_gradient_on_meta():
    """Nothing is made on the CPU, and no value is read."""
    model = models.ctc_recognizer(num_classes=5, dropout=0.0)
    params, buffers = model.init(random.key(0), device="meta")
    x, lengths, targets = torch.empty(3, 1, 32, 64), torch.full((3,), 16), torch.ones(3, 4, dtype=torch.int64)
    x, lengths, targets = (t.to("meta") for t in (x, lengths, targets))

    def loss(params):
        log_probs, _ = model.apply(params, buffers, x, lengths, train=True)
        return losses.ctc(log_probs, targets, input_lengths=lengths), log_probs

    gradient, log_probs = torch.func.grad(loss, has_aux=True)(params)
    assert all(t.is_meta for t in gradient.values())
    for decode in (ctc.greedy_decode, ctc.prefix_beam_decode):
        found = decode(log_probs, lengths)
        assert found.labels.is_meta
        assert ctc.edit_distance(found.labels, targets).is_meta


def test_it_learns_to_read_three_lines():
    """Loss, model and decoding mean the same classes and frames."""
    model = models.ctc_recognizer(num_classes=3, dropout=0.0)
    params, buffers = model.init(random.key(0))
    x, lengths = random.normal(random.key(1), (3, 1, 32, 40)), torch.tensor([10, 8, 5])
    targets = torch.tensor([[1, 2, 1, 3], [3, 2, -100, -100], [2, -100, -100, -100]])

    def loss(params):
        out, new = model.apply(params, buffers, x, lengths, train=True)
        return losses.ctc(out, targets, input_lengths=lengths), new

    for _ in range(40):
        grads, buffers = torch.func.grad(loss, has_aux=True)(params)
        params = {n: p - 0.3 * grads[n] for n, p in params.items()}
    log_probs, _ = model.apply(params, buffers, x, lengths, train=True)
    assert torch.equal(ctc.greedy_decode(log_probs, lengths).labels[:, :4], targets)
    assert torch.equal(ctc.prefix_beam_decode(log_probs, lengths).labels[:, :4], targets)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "lengths", "error", "message"),
    [
        ((2, 1, 30, 64), [16, 9], ValueError, r"images must have shape \(N, 1, 32, W\) with N at least 1, got \(2, 1, 30, 64\)"),
        ((0, 1, 32, 64), [], ValueError, "with N at least 1"),
        ((2, 1, 32, 62), [15, 9], ValueError, "images must be a multiple of 4 pixels wide, got 62"),
        ((2, 1, 32, 0), [1, 1], ValueError, "images must be a multiple of 4 pixels wide, got 0"),
        ((2, 1, 32, 64), [17, 9], ValueError, r"lengths must be in \[1, 16\], the width divided by 4, got 9 to 17"),
        ((2, 1, 32, 64), [16, 0], ValueError, r"lengths must be in \[1, 16\].*got 0 to 16"),
        ((2, 1, 32, 64), [16], ValueError, r"lengths must have shape \(2,\), one for each sequence, got \(1,\)"),
        ((2, 1, 32, 64), [1.0, 2.0], TypeError, "lengths must be an integer tensor, the width divided by 4, got torch.float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", THEIRS)
def test_bad_input(name, shape, lengths, error, message):
    model, params, buffers, _ = start(name, torch.float32)
    with pytest.raises(error, match=message):
        model.apply(params, buffers, torch.zeros(shape), torch.tensor(lengths))


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        models.ctc_recognizer(num_classes=0)
    with pytest.raises(TypeError, match=r"models\.character_classifier has no option 'dropout'"):
        models.character_classifier(dropout=0.1)
