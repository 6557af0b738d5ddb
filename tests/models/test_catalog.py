"""Listing and creating models, and what their constructors refuse."""

import inspect

import pytest

from holofunc import models

NAMES = models.list_models(task="classification")


def test_all_of_holocrons_constructors_are_there():
    assert len(set(NAMES) - {"smallnet"}) == 48  # which is the command line's own
    assert set(NAMES) <= set(models.__all__)
    for name in NAMES:
        first = list(inspect.signature(getattr(models, name)).parameters.values())[:3]
        assert [(p.name, p.default) for p in first] == [("num_classes", 10), ("in_channels", 3), ("weights", None)]
        assert getattr(models, name).__doc__


def test_lists_are_filtered():
    assert models.list_models("repvit*") == ["repvit_m0_9", "repvit_m1_0", "repvit_m1_1"]
    assert models.list_models("resne*", pretrained=False) == ["resnet101", "resnet152", "resnext101_32x8d"]
    assert len(models.list_models(pretrained=True)) == 29
    with pytest.raises(ValueError, match="task must be one of 'classification'"):
        models.list_models(task="sorting")


@pytest.mark.parametrize("name", NAMES)
def test_created_by_name(name):
    model = models.create(name, num_classes=7, in_channels=1)
    assert model.name == name
    assert [p.shape[0] for p in model.skeleton.parameters()][-1] == 7
    assert next(p for p in model.skeleton.parameters() if p.ndim == 4).shape[1] == 1
    assert all(t.is_meta for t in model.skeleton.state_dict().values())


def test_a_wrong_name_is_answered_with_those_alike():
    with pytest.raises(ValueError, match="no model named 'resnet20': did you mean 'resnet50'"):
        models.create("resnet20")


@pytest.mark.parametrize("name", ["resnet18", "darknet19", "repvit_m0_9"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1, got 0"),
        ({"in_channels": 0}, ValueError, "in_channels must be an integer of at least 1, got 0"),
        ({"num_classes": 2.0}, ValueError, "num_classes must be an integer of at least 1, got 2.0"),
        ({"act_layer": None}, TypeError, "has no option 'act_layer'"),
        ({"pretrained": True}, TypeError, "has no option 'pretrained': use weights="),
        ({"new_head": True}, ValueError, "weights must be given"),
    ],
)
def test_bad_arguments(name, options, error, message):
    with pytest.raises(error, match=message):
        models.create(name, **options)


def test_an_option_of_other_blocks_is_refused():
    with pytest.raises(TypeError, match="resnet18 has no option 'groups'"):
        models.resnet18(groups=2)
    with pytest.raises(TypeError, match="darknet19 has no option 'zero_init_residual'"):
        models.darknet19(zero_init_residual=True)


@pytest.mark.parametrize(
    ("name", "options", "params", "gmacs"),
    [
        ("resnet50", {}, 25_557_032, 4.09),  # He et al., as counted by torchvision
        ("resnet152", {}, 60_192_808, 11.51),
        ("resnext101_32x8d", {}, 88_791_336, 16.41),
        ("convnext_tiny", {"paper": True}, 28_589_128, 4.46),
        ("convnext_xl", {}, 350_196_968, 60.9),
        ("rexnet1_0x", {}, 4_796_186, 0.40),
        ("cspdarknet53", {"paper": True}, 27_642_184, None),
    ],
)
def test_the_papers_sizes(name, options, params, gmacs):
    model = models.create(name, num_classes=1000, **options)
    assert sum(p.numel() for p in model.skeleton.parameters()) == params
    if gmacs:
        assert models.table(name)[0].macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_papers_variants():
    for name, millions in (("sknet50", 27.5), ("sknet101", 48.9)):
        skeleton = models.create(name, num_classes=1000, paper=True).skeleton
        assert sum(p.numel() for p in skeleton.parameters()) == pytest.approx(millions * 1e6, rel=3e-3)
    slopes = {
        m.negative_slope for m in models.cspdarknet53(paper=True).skeleton.modules() if hasattr(m, "negative_slope")
    }
    assert slopes == {0.1}
    eps = {m.eps for m in models.convnext_atto(paper=True).skeleton.modules() if hasattr(m, "eps")}
    assert eps == {1e-6}


def test_the_table_says_what_there_is():
    (row,) = models.table("rexnet1_0x")
    assert row.weights == ("rexnet1_0x.imagenet1k", "rexnet1_0x.imagenette")
    assert (row.params, row.top1, row.dataset) == (3_527_996, 0.7786, "imagenet-1k")
    assert models.table("resnet101")[0].weights == ()
    assert models.table("resnet101")[0].top1 is None
