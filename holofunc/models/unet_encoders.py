"""U-Nets on the encoders that Holocron chose: a U-Net's own, VGG, ResNet and ReXNet."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models import surgery
from holofunc.models.derived import Derived
from holofunc.models.rexnet import rexnet1_3x
from holofunc.models.unet import Layers
from holofunc.models.unet_dynamic import dynamic_unet
from holofunc.nn.init import kaiming
from holofunc.typing import Buffers, Params

__all__ = ["unet2", "unet_rexnet13", "unet_tvresnet34", "unet_tvvgg11"]


def unet2(num_classes: int = 21, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """A U-Net's encoder with pixel shuffle, 19.5 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `DynamicUNet`, and ``layout``, the widths of the encoder's stages.

    Example:
        >>> from holofunc import models
        >>> models.unet2(num_classes=10)
        Model(unet2, 19,506,506 parameters)
    """
    layout = options.pop("layout", (64, 128, 256, 512))
    kinds = Layers(**{n: f for n, f in options.items() if n in Layers._fields})
    stages = Model(lambda: nn.Sequential(*kinds.encoder(in_channels, layout)), initialize=kaiming, name="encoder")
    names = [str(i) for i in range(len(layout))]
    return dynamic_unet(stages, num_classes, weights, names=names, name="unet2", **options)


def unet_tvvgg11(
    num_classes: int = 21, in_channels: int = 3, weights: Any = None, *, encoder_weights: Any = None, **options: Any
) -> Model:
    """A U-Net on torchvision's VGG-11, 32.2 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        encoder_weights: torchvision's of the encoder: a member of ``torchvision.models.VGG11_Weights`` or its name,
            like ``"DEFAULT"``; fetched by `Model.init`.
        options: those of `DynamicUNet`.
    """
    encoder = _part(_torchvision("vgg11", in_channels, encoder_weights), "features")
    names = ["1", "4", "9", "14", "19"]
    return dynamic_unet(encoder, num_classes, weights, names=names, name="unet_tvvgg11", **options)


def unet_tvresnet34(
    num_classes: int = 21, in_channels: int = 3, weights: Any = None, *, encoder_weights: Any = None, **options: Any
) -> Model:
    """A U-Net on torchvision's ResNet-34, 36.2 M parameters; arguments as for `unet_tvvgg11`."""
    encoder = _torchvision("resnet34", in_channels, encoder_weights)
    names = ["relu", "layer1", "layer2", "layer3", "layer4"]
    return dynamic_unet(encoder, num_classes, weights, names=names, name="unet_tvresnet34", **options)


def unet_rexnet13(
    num_classes: int = 21, in_channels: int = 3, weights: Any = None, *, encoder_weights: Any = None, **options: Any
) -> Model:
    """A U-Net on ReXNet 1.3x, 9.3 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        encoder_weights: as ``weights`` of `holofunc.models.rexnet1_3x`.
        options: those of `DynamicUNet`.
    """
    body = rexnet1_3x(1, in_channels, encoder_weights, **({} if encoder_weights is None else {"new_head": True}))
    names = ["3", "5", "7", "13", "18"]
    options = {"act_layer": nn.SiLU} | options
    return dynamic_unet(_part(body, "features"), num_classes, weights, names=names, name="unet_rexnet13", **options)


# --- encoders ----------------------------------------------------------------------------------------------------


def _part(model: Model, path: str) -> Model:
    """A part of a model, with the start that it has there."""
    prefix = f"{path}."

    def own(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}

    return Derived(
        model,
        change=lambda module: module.get_submodule(path),
        convert=lambda params, buffers: (own(params), own(buffers)),
    )


def _torchvision(name: str, in_channels: int, weights: Any) -> Model:
    """A classifier of torchvision for images of so many channels, its weights loaded when it starts."""
    from torchvision import models as torchvision

    def build() -> nn.Module:
        module = getattr(torchvision, name)()
        path, first = next((p, m) for p, m in module.named_modules() if isinstance(m, nn.Conv2d))
        if first.in_channels != in_channels:
            same = {n: getattr(first, n) for n in ("kernel_size", "stride", "padding")}
            parent, _, last = path.rpartition(".")
            conv = nn.Conv2d(in_channels, first.out_channels, **same, bias=first.bias is not None)
            setattr(module.get_submodule(parent), last, conv)
        return module

    model = Model(build, name=name)
    if weights is None:
        return model
    known = torchvision.get_model_weights(name)
    chosen = known[weights] if isinstance(weights, str) and weights in known.__members__ else weights
    if not isinstance(chosen, known):
        raise ValueError(
            f"encoder_weights must be a member of {known.__name__}, {', '.join(known.__members__)}, got {weights!r}"
        )

    def load(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        values = chosen.get_state_dict(progress=False, check_hash=True)
        values = surgery.new_input(model, values)
        place: Callable[[str, Tensor], Tensor] = lambda n, like: values[n].to(like.device, like.dtype)  # noqa: E731
        return {n: place(n, p) for n, p in params.items()}, {n: place(n, b) for n, b in buffers.items()}

    return Derived(model, convert=load)
