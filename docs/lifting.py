# ruff: noqa: T201
"""The laws of lifting, tried on other libraries' architectures: ``python docs/lifting.py`` prints the table of lift.md.

A law that a constructor keeps is "yes"; one that is refused by an error of ours says so. Everything else raises.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from holofunc import from_module, lift, random, tree

LAWS = ("eval", "train", "keyed", "gradient", "per sample", "round trip")

TORCHVISION = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "regnet_x_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
    *("wide_resnet50_2", "segmentation.fcn_resnet50", "segmentation.deeplabv3_mobilenet_v3_large"),
    *("segmentation.lraspp_mobilenet_v3_large", "video.r3d_18", "video.mc3_18", "video.r2plus1d_18", "video.s3d"),
    *("video.mvit_v2_s", "video.swin3d_t", "detection.fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("detection.retinanet_resnet50_fpn", "detection.ssdlite320_mobilenet_v3_large", "detection.fcos_resnet50_fpn"),
]
TIMM = [
    *("beit_base_patch16_224", "bat_resnext26ts", "botnet26t_256", "cait_xxs24_224", "caformer_s18", "coat_tiny"),
    *("coatnet_pico_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "crossvit_tiny_240", "cs3darknet_s"),
    *("cspresnet50", "davit_tiny", "deit3_small_patch16_224", "densenet121", "dla34", "dm_nfnet_f0", "dpn48b"),
    *(
        "eca_nfnet_l0",
        "edgenext_xx_small",
        "efficientformer_l1",
        "efficientnet_b0",
        "efficientvit_b0",
        "efficientvit_m0",
    ),
    *("eva02_tiny_patch14_224", "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gcresnet33ts", "gcvit_xxtiny"),
    *("ghostnet_050", "hardcorenas_a", "hgnet_tiny", "hrnet_w18_small", "inception_next_tiny", "lambda_resnet26t"),
    *("lcnet_050", "levit_128s", "maxvit_pico_rw_256", "mixer_s32_224", "mixnet_s", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nf_resnet26"),
    *("pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9"),
    *("res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet18", "resnetv2_50", "rexnet_100", "selecsls42"),
    *("semnasnet_075", "seresnext26d_32x4d", "skresnet18", "spnasnet_100", "swin_tiny_patch4_window7_224"),
    *("tf_efficientnet_b0", "tiny_vit_5m_224", "tinynet_e", "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small"),
    *(
        "vgg11",
        "visformer_tiny",
        "vit_tiny_patch16_224",
        "volo_d1_224",
        "vovnet39a",
        "xception41",
        "xcit_nano_12_p8_224",
    ),
]
"""A constructor of each family."""


def constructors(library: str) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Functions that make small forms of a library's architectures, and the shape of a batch, by name."""
    if library == "torchvision":
        import torchvision

        return {f"torchvision {name}": _of_torchvision(torchvision.models, name) for name in TORCHVISION}
    import timm

    names = [name for name in TIMM if timm.is_model(name)]
    return {
        f"timm {name}": (lambda name=name: timm.create_model(name, num_classes=5), _timm_shape(timm, name))
        for name in names
    }


def _of_torchvision(library: Any, name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    room, _, leaf = name.rpartition(".")
    build = getattr(getattr(library, room) if room else library, leaf)
    options: dict[str, Any] = {"weights": None}
    if room in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if leaf in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if leaf == "densenet121":
        options["drop_rate"] = 0.3
    size = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 224, "alexnet": 64, "s3d": 64, "mvit_v2_s": 224}.get(
        leaf, 64
    )
    shape = (2, 3, 16 if leaf in ("mvit_v2_s", "s3d") else 4, size, size) if room == "video" else (2, 3, size, size)
    return lambda: build(**options), shape


def _timm_shape(library: Any, name: str) -> tuple[int, ...]:
    settings = library.get_pretrained_cfg(name)
    fixed = settings.fixed_input_size or settings.input_size[-1] % 32
    return (2, 3, *settings.input_size[1:]) if fixed else (2, 3, 64, 64)


def laws(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Which laws a constructor's model keeps, one after the other."""
    model = lift(build)
    params, buffers = model.init(random.key(0))
    x = random.uniform(random.key(1), shape)
    detector = "detection" in getattr(build, "__module__", "") or model.name in DETECTORS
    inputs: Any = ([*x],) if detector else (x,)
    module = model.to_module(params, buffers)
    with torch.no_grad():
        yield "eval", _close(model.apply(params, buffers, *inputs)[0], module(*inputs))
    if detector:
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0]])
        inputs = (*inputs, [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)} for _ in x])

    quiet = _without_dropout(model.to_module(params, buffers)).train()
    still, *values = from_module(quiet)
    with torch.no_grad():
        out, renewed = still.apply(*values, *inputs, train=True, key=random.key(2))
        same = _close(out, quiet(*inputs)) if not detector else "sampled"
        yield "train", same if detector else _close(renewed, dict(quiet.named_buffers()), some=True)

    before = torch.get_rng_state()
    once, again = (model.apply(params, buffers, *inputs, train=True, key=random.key(2))[0] for _ in range(2))
    kept = torch.equal(before, torch.get_rng_state())
    yield "keyed", _close(once, again) if kept else "the global generator moved"

    def loss(params: Any, x: Any) -> torch.Tensor:
        return sum(y.square().mean() for y in tree.leaves(model.apply(params, buffers, x)[0]) if y.is_floating_point())

    if detector:
        return
    gradient = torch.func.grad(loss)(params, x)
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()), allow_unused=True)
    pairs = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), expected, strict=True)}
    yield "gradient", _close(gradient, pairs)
    try:
        each = torch.vmap(lambda x: torch.func.grad(loss)(params, x[None]))(x)
        alone = torch.func.grad(loss)(params, x[:1])
        yield "per sample", _close({n: g[0] for n, g in each.items()}, alone)
    except RuntimeError as error:
        yield "per sample", f"no: {str(error).strip().partition(chr(10))[0][:60]}"
    again_model, *again_values = from_module(module)
    yield "round trip", _close(again_model.apply(*again_values, x)[0], model.apply(params, buffers, x)[0])


DETECTORS = ("FasterRCNN", "RetinaNet", "SSD", "FCOS")


def _without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name in ("p", "dropout", "drop_prob", "drop_rate", "dropout_prob", "attention_dropout"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 0.0)
    return module


def _close(a: Any, b: Any, some: bool = False) -> str:
    """Whether two trees of tensors agree; of ``some`` names only, where they have different ones."""
    if some:
        b = {n: b[n] for n in a}
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        if isinstance(x, torch.Tensor):
            scale = float(y.abs().max()) if y.numel() else 1.0
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), equal_nan=True)
    return "yes"


def row(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[str]:
    """A line of the table."""
    found = dict.fromkeys(LAWS, "")
    try:
        for law, answer in laws(build, shape):
            found[law] = answer
    except (ValueError, TypeError) as error:
        found[next(law for law in LAWS if not found[law])] = f"refused: {str(error).partition(chr(10))[0][:80]}"
    return [name, *found.values()]


def main(libraries: list[str]) -> None:
    """Print the table."""
    print("| constructor |", " | ".join(LAWS), "|")
    print("| --- |" + " --- |" * len(LAWS))
    for library in libraries or ["torchvision", "timm"]:
        for name, (build, shape) in constructors(library).items():
            try:
                cells = row(name, build, shape)
            except Exception as error:
                cells = [name, f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
