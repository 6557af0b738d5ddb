# ruff: noqa: T201
"""Check `lift` on the architectures of other libraries: ``python docs/lifting.py [LIBRARY | NAME ...]``.

Results go into the table of ``lifting.md``; other rows stay. A check that passes is "yes", one that cannot apply says
why, everything else is "FAILS". The whole table takes about an hour on one core.
"""

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holofunc import from_module, jit, lift, random, tree

LAWS = ("eval", "train", "keyed", "gradient", "per sample", "jvp", "jit", "round trip")
PAGE = Path(__file__).parent / "lifting.md"
NOT_TRIED = "–"  # noqa: RUF001


DOUBLE = ("deeplabv3_resnet101", "fcn_resnet101", "resnet152", "timm inception_v3", "mobileone_s0")
"""Checked in float64: in float32 their gradients overflow, or are so large that their sums lose digits."""


class Specimen(NamedTuple):
    """An architecture, and what to try it on."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs, with a batch in front; one of whole numbers if ``words``."""
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    words: int = 0
    """How many there are, if the inputs are words."""
    detects: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[Tensor, ...]:
        if self.words:
            return tuple(random.randint(random.key(1), shape, 0, self.words) for shape in self.shapes)
        return tuple(random.uniform(random.key(i + 1), s, dtype=self.dtype) for i, s in enumerate(self.shapes))


# --- torchvision: every constructor ------------------------------------------------------------------------------

SIZES = {"inception_v3": 299, "maxvit_t": 224, "raft_large": 128, "raft_small": 128}
CLIPS = {"s3d": (1, 3, 16, 224, 224), **dict.fromkeys(("mvit_v1_b", "mvit_v2_s"), (1, 3, 16, 224, 224))}
BUILT_WITH: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "densenet121": {"drop_rate": 0.3},
    **{n: {"image_size": 64} for n in ("vit_b_16", "vit_b_32")},
}
FEW = {
    **{f"rpn_post_nms_top_n_{mode}": 50 for mode in ("train", "test")},
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
}
"""Boxes, as each costs a pass of a head."""


def torchvision() -> dict[str, Specimen]:
    models = import_module("torchvision.models")
    names = [n for n in models.list_models() if not n.startswith(("quantized", "vit_l", "vit_h", "regnet_y_128"))]
    return {name: _of_torchvision(models, name) for name in names}


def _of_torchvision(models: Any, name: str) -> Specimen:
    build = models.get_model_builder(name)
    room, size = build.__module__.split(".")[2], SIZES.get(name, 64)
    options: dict[str, Any] = {"weights": None, **BUILT_WITH.get(name, {})}
    if room in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if room == "detection" and not name.startswith("ssd"):
        options.update(min_size=64, max_size=64)
    if "rcnn" in name:
        options.update(FEW)
    shape = (2, 3, size, size) if room != "video" else CLIPS.get(name, (2, 3, 8, size, size))
    if room == "optical_flow":
        return Specimen(partial(build, **options), (shape, shape), {"num_flow_updates": 2})
    dtype = torch.float64 if name in DOUBLE else torch.float32
    return Specimen(partial(build, **options), (shape,), detects=room == "detection", dtype=dtype)


# --- timm: a constructor of each family --------------------------------------------------------------------------

TIMM = [
    *("bat_resnext26ts", "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "caformer_s18", "coat_tiny"),
    *("coatnet_pico_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "crossvit_tiny_240", "cs3darknet_s"),
    *("cspresnet50", "davit_tiny", "deit3_small_patch16_224", "densenet121", "dla34", "dm_nfnet_f0", "dpn48b"),
    *("eca_nfnet_l0", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0", "efficientvit_b0"),
    *("efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gcresnet33ts"),
    *("gcvit_xxtiny", "ghostnet_050", "hardcorenas_a", "hgnet_tiny", "hiera_tiny_224", "hrnet_w18_small"),
    *("inception_next_tiny", "inception_v3", "lambda_resnet26t", "lcnet_050", "levit_128s", "mambaout_femto"),
    *("maxvit_pico_rw_256", "mixer_s32_224", "mixnet_s", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small", "nf_resnet26"),
    *("pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvgg_a0"),
    *("repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet18", "resnetv2_50", "rexnet_100"),
    *("selecsls42", "semnasnet_075", "seresnext26d_32x4d", "sequencer2d_s", "shvit_s1", "skresnet18", "spnasnet_100"),
    *("starnet_s1", "swin_tiny_patch4_window7_224", "swiftformer_xs", "tf_efficientnet_b0", "tiny_vit_5m_224"),
    *("tinynet_e", "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "vgg11", "visformer_tiny"),
    *("vit_tiny_patch16_224", "volo_d1_224", "vovnet39a", "xception41", "xcit_nano_12_p8_224"),
]  # fmt: skip


def timm() -> dict[str, Specimen]:
    library = import_module("timm")
    return {name: _of_timm(library, name) for name in TIMM if library.is_model(name)}


def _of_timm(library: Any, name: str) -> Specimen:
    settings = library.get_pretrained_cfg(name)
    fixed = settings.fixed_input_size or settings.input_size[-1] % 32 or name == "bat_resnext26ts"
    shape = (2, 3, *settings.input_size[1:]) if fixed else (2, 3, 64, 64)
    dtype = torch.float64 if name in DOUBLE or f"timm {name}" in DOUBLE else torch.float32
    return Specimen(partial(library.create_model, name, num_classes=5), (shape,), dtype=dtype)


# --- transformers and segmentation_models_pytorch ----------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", IMAGES),
    "DeiTForImageClassification": ("DeiTConfig", IMAGES),
    "BeitForImageClassification": ("BeitConfig", {**IMAGES, "drop_path_rate": 0.2}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**IMAGES, "drop_path_rate": 0.2}),
    "ViTMAEForPreTraining": (
        *("ViTMAEConfig", {**IMAGES, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}),
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", {**IMAGES, "attention_dropout": 0.1}),
    "SwinForImageClassification": ("SwinConfig", {"image_size": 32, "embed_dim": 8, "depths": [1, 1],
                                                  "num_heads": [1, 2], "window_size": 4}),
    "ConvNextForImageClassification": ("ConvNextConfig", {**FOUR, "drop_path_rate": 0.2}),
    "ResNetForImageClassification": ("ResNetConfig", {**FOUR, "embedding_size": 8}),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {**FOUR, "decoder_hidden_size": 16,
                                                             "num_attention_heads": [1, 1, 2, 2]}),
    "MobileViTForImageClassification": ("MobileViTConfig", {"image_size": 64, "hidden_sizes": [16, 16, 16],
                                                            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]}),
    "BertForSequenceClassification": ("BertConfig", {**SMALL, "vocab_size": 50}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}),
}  # fmt: skip
UNETS = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
         "Segformer", "DPT")  # fmt: skip


def transformers() -> dict[str, Specimen]:
    library = import_module("transformers")
    made = {}
    for name, (config, options) in TRANSFORMERS.items():
        build = partial(_transformer, library, name, config, options)
        words, size = options.get("vocab_size", 0), options.get("image_size", 64)
        shape = (2, 6) if words else (2, 3, size, size)
        made[name] = Specimen(build, (shape,), {"use_cache": False} if name.startswith("GPT") else {}, words)
    return made


def _transformer(library: Any, name: str, config: str, options: dict[str, Any]) -> nn.Module:
    return getattr(library, name)(getattr(library, config)(**options))


def segmentation_models_pytorch() -> dict[str, Specimen]:
    library = import_module("segmentation_models_pytorch")
    encoders = {"DPT": "tu-vit_tiny_patch16_224"}
    return {
        name: Specimen(
            partial(getattr(library, name), encoders.get(name, "resnet18"), encoder_weights=None, classes=3),
            ((2, 3, *{"DPT": (224, 224), "PAN": (128, 128)}.get(name, (64, 64))),),
        )
        for name in UNETS
    }


LIBRARIES = (torchvision, timm, transformers, segmentation_models_pytorch)
COMPILED = ("torchvision resnet18", "torchvision convnext_tiny", "timm ghostnet_050", "timm vit_tiny_patch16_224",
            "transformers ViTForImageClassification", "segmentation_models_pytorch Unet")  # fmt: skip
"""A few that are compiled, too: each takes half a minute."""


# --- laws --------------------------------------------------------------------------------------------------------


def laws(specimen: Specimen, compiled: bool = False) -> Iterator[tuple[str, str]]:
    """Which laws an architecture keeps, one after the other."""
    model = lift(specimen.build)
    params, buffers = model.init(random.key(0), dtype=specimen.dtype)
    inputs: Any = specimen.inputs()
    if specimen.detects:
        inputs = ([*inputs[0]],)
    run = partial(model.apply, **specimen.options)
    module = model.to_module(params, buffers)
    with torch.no_grad():
        out, other = (run(params, buffers, *inputs, key=random.key(seed))[0] for seed in (3, 4))
        yield "eval", close(out, module(*inputs, **specimen.options)) if _same(out, other) else "sampled"
    del module
    if specimen.detects:
        inputs = (*inputs, [target() for _ in inputs[0]])
    yield from _training(specimen, inputs, run, params, buffers)
    if not specimen.detects:
        yield from _derivatives(specimen, inputs, run, params, buffers)
    if compiled:
        key = random.key(2)
        yield "jit", close(*(f(params, buffers, *inputs, train=True, key=key) for f in (jit(run, fullgraph=True), run)))
    again, *values = from_module(model.to_module(params, buffers))
    outs = (
        f(*v, *(inputs[:1] if specimen.detects else inputs), key=random.key(3), **specimen.options)
        for f, v in ((again.apply, values), (model.apply, (params, buffers)))
    )
    yield "round trip", close(*(out for out, _ in outs))


def _training(specimen: Specimen, inputs: Any, run: Any, params: Any, buffers: Any) -> Iterator[tuple[str, str]]:
    quiet = _without_dropout(run.func.__self__.to_module(params, buffers)).train()
    still, *values = from_module(quiet)
    with torch.no_grad():
        out, renewed = still.apply(*values, *inputs, train=True, key=random.key(2), **specimen.options)
        other = still.apply(*values, *inputs, train=True, key=random.key(4), **specimen.options)[0]
        expected = quiet(*inputs, **specimen.options)
        theirs = dict(quiet.named_buffers())
        drawn = not _same(out, other)  # whatever is left is drawn, and torch draws something else
        new = close(renewed, {n: theirs[n] for n in renewed}) if not drawn else "sampled"
        yield "train", new if drawn else close(out, expected)
    before = torch.get_rng_state()
    once, again = (run(params, buffers, *inputs, train=True, key=random.key(2))[0] for _ in range(2))
    kept = torch.equal(before, torch.get_rng_state())
    yield "keyed", close(once, again) if kept else "FAILS: the global generator moved"


def _derivatives(specimen: Specimen, inputs: Any, run: Any, params: Any, buffers: Any) -> Iterator[tuple[str, str]]:
    def loss(params: Any, *inputs: Any) -> Tensor:
        outs = run(params, buffers, *inputs, key=random.key(3))[0]
        return sum(y.square().mean() for y in _tensors(outs) if y.is_floating_point())

    gradient = torch.func.grad(loss)(params, *inputs)
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    given = torch.autograd.grad(loss(leaves, *inputs), list(leaves.values()), allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), given, strict=True)}
    yield "gradient", close(gradient, expected)
    del leaves, given, expected
    yield "per sample", _where_torch_can(_per_sample, loss, params, inputs)
    yield "jvp", _where_torch_can(_jvp, loss, params, inputs, gradient)


def _per_sample(loss: Any, params: Any, inputs: Any) -> str:
    def one(*sample: Any) -> Any:
        return torch.func.grad(loss)(params, *(x[None] for x in sample))

    each = torch.vmap(one, randomness="different")(*inputs)
    return close({n: g[0] for n, g in each.items()}, one(*(x[0] for x in inputs)), 5e-3)


def _jvp(loss: Any, params: Any, inputs: Any, gradient: Any) -> str:
    """Along the gradient the slope is its squared norm."""
    slope = torch.func.jvp(lambda p: loss(p, *inputs), (params,), (gradient,))[1]
    return close(slope, sum(g.double().square().sum() for g in gradient.values()).to(slope.dtype))


def _where_torch_can(law: Callable[..., str], *args: Any) -> str:
    try:
        return law(*args)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch cannot: {_line(error)}"


def target() -> dict[str, Tensor]:
    """Of one image: an object with its box, mask and key points."""
    mask, points = torch.zeros(1, 64, 64, dtype=torch.uint8), torch.full((1, 17, 3), 20.0)
    mask[:, 5:40, 5:40] = 1
    return {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.ones(1, dtype=torch.int64),
            "masks": mask, "keypoints": points}  # fmt: skip


def _without_dropout(module: nn.Module) -> nn.Module:
    """The module with every rate of dropout set to zero, in its parts and in their configurations."""
    for part in module.modules():
        for holder in (part, getattr(part, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and (name == "p" or "drop" in name):
                    setattr(holder, name, 0.0)
    return module


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in tree.leaves(dict(out) if isinstance(out, dict) else out) if isinstance(x, Tensor)]


def _same(a: Any, b: Any) -> bool:
    pairs = list(zip(_tensors(a), _tensors(b), strict=False))
    return len(_tensors(a)) == len(_tensors(b)) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def close(a: Any, b: Any, tolerance: float = 2e-4) -> str:
    """Whether two trees of tensors agree, each relative to its largest number."""
    for x, y in zip(_tensors(a), _tensors(b), strict=True):
        scale = float(y.abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=1e-3, atol=tolerance * max(scale, 1e-3), equal_nan=True)
    return "yes"


# --- the page ----------------------------------------------------------------------------------------------------


def specimens(libraries: Iterable[Callable[[], dict[str, Specimen]]] = LIBRARIES) -> dict[str, Specimen]:
    """All that are installed, by library and name."""
    found = {}
    for library in libraries:
        try:
            found.update({f"{library.__name__} {name}": specimen for name, specimen in library().items()})
        except ImportError:
            print(f"{library.__name__} is not installed", file=sys.stderr)
    return found


def row(name: str, specimen: Specimen) -> list[str]:
    """A line of the table."""
    found = dict.fromkeys(LAWS, NOT_TRIED)
    try:
        for law, answer in laws(specimen, name in COMPILED):
            found[law] = answer
    except (ValueError, TypeError) as error:
        found[next(law for law in LAWS if found[law] == NOT_TRIED)] = f"refused: {_line(error)}"
    except Exception as error:
        found[next(law for law in LAWS if found[law] == NOT_TRIED)] = f"FAILS: {type(error).__name__}: {_line(error)}"
    return [name, *found.values()]


def _line(error: Exception) -> str:
    return re.sub(r"[|<>]", " ", " ".join(str(error).split()))[:160]


def written() -> dict[str, str]:
    """The rows of the page."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if re.match(r"\| \w+ \w+ \|", line)}


HEAD = """# Lifted architectures, tested

`python docs/lifting.py` made this page{versions}. [Any module](lift.md#tested-architectures) explains the columns.

{counts}
Architectures without a row have not been run. Values are compared in float32, except those of {double}, which are in
float64 because their float32 gradients overflow or lose digits. The tolerance is 5e-3 of the largest value for
per-sample gradients and 2e-4 for everything else.

"""


def page(rows: dict[str, str]) -> str:
    """The page of these rows."""
    names = [library.__name__ for library in LIBRARIES]
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", *names) if _installed(n))
    kept = {n: sum(not re.search("FAILS|refused", r) for k, r in rows.items() if k.split()[0] == n) for n in names}
    counts = ", ".join(f"{kept[n]} of {sum(k.split()[0] == n for k in rows)} of {n}" for n in names)
    head = HEAD.format(
        versions=f" with {versions}",
        double=", ".join(DOUBLE),
        counts=f"Every check that torch supports passes for {counts}.",
    )
    table = [f"| architecture | {' | '.join(LAWS)} |", "| --- |" + " --- |" * len(LAWS), *rows.values()]
    return head + "\n".join(table) + "\n"


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


def main(wanted: list[str]) -> None:
    """Run the checks that are asked for and update the page."""
    known = specimens()
    names = [n for n in known if not wanted or n in wanted or n.split()[0] in wanted or n.split()[1] in wanted]
    order = {name: place for place, name in enumerate(known)}
    for name in names:
        start = time.perf_counter()
        line = f"| {' | '.join(row(name, known[name]))} |"
        print(line, f"{time.perf_counter() - start:.1f} s", flush=True)
        rows = {**written(), name: line}  # another run may have written in the meantime
        PAGE.write_text(page(dict(sorted(rows.items(), key=lambda item: order.get(item[0], len(order))))))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
