"""Masks of the parameters that stay as they are, by the order of the layers; by name: `label_by_path`."""

from collections.abc import Iterable

from holofunc import tree
from holofunc.typing import Params

__all__ = ["frozen_layers", "layers", "up_to"]


def layers(params: Params, depth: int = 1) -> list[str]:
    """The names of the layers, in the order of the network: the first ``depth`` parts of the parameters' names.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.0.weight": torch.ones(1), "body.1.weight": torch.ones(1)}
        >>> optim.layers(params), optim.layers(params, depth=2)
        (['stem', 'body'], ['stem', 'body.0', 'body.1'])
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    modules = [path.split(".")[:-1] or [path] for path in tree.paths(params)]
    return list(dict.fromkeys(".".join(parts[:depth]) for parts in modules))


def frozen_layers(params: Params, which: int | slice | Iterable[int], *, depth: int = 1) -> dict[str, bool]:
    """A mask for `freeze`: True for the parameters of the layers with these numbers in `layers`.

    Args:
        params: the parameters.
        which: a number, a slice, or numbers; negative ones count from the end.
        depth: as for `layers`.

    Raises:
        ValueError: there is no such layer; the message lists those that there are.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.weight": torch.ones(1), "head.weight": torch.ones(1)}
        >>> optim.frozen_layers(params, slice(0, 2))
        {'stem.weight': True, 'body.weight': True, 'head.weight': False}
    """
    names = layers(params, depth)
    numbers = range(len(names))[which] if isinstance(which, slice) else [which] if isinstance(which, int) else which
    try:
        chosen = {names[i] for i in numbers}
    except IndexError:
        raise ValueError(f"which must be among the {len(names)} layers {names}, got {which!r}") from None
    return {path: any(tree.matches(path, name) for name in chosen) for path in tree.paths(params)}


def up_to(params: Params, last: str) -> dict[str, bool]:
    """A mask for `freeze`: True for everything up to and including a layer, in the order of the network.

    Args:
        params: the parameters.
        last: a module (``"layer2"``, ``"layer2.0.conv1"``) or a parameter.

    Raises:
        ValueError: nothing is called so; the message lists the layers.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.weight": torch.ones(1), "head.weight": torch.ones(1)}
        >>> optim.up_to(params, "body")
        {'stem.weight': True, 'body.weight': True, 'head.weight': False}
    """
    paths = tree.paths(params)
    ends = [i for i, path in enumerate(paths) if tree.matches(path, last)]
    if not ends:
        raise ValueError(f"last must be a layer, such as {layers(params)}, got {last!r}")
    return {path: i <= ends[-1] for i, path in enumerate(paths)}
