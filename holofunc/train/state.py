"""The state of a training run, as one tree of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.model import Model
from holofunc.optim.base import GradientTransformation, as_transformation
from holofunc.typing import Buffers, Key, Params, PyTree

__all__ = ["TrainState", "create_state"]


class TrainState(NamedTuple):
    """Everything that a training step reads and updates; saving a run means saving this state.

    It prints as its `holofunc.tree.summary`; its fields print their values.

    Attributes:
        step: calls of the step so far, int64, 0-d. Schedules count applied updates, in ``opt_state``.
        params: parameters by name.
        buffers: buffers (BatchNorm statistics) by name.
        opt_state: state of the gradient transformation.
        key: the root key; the key of a step is ``fold_in(key, step)``.
    """

    step: Tensor
    params: Params
    buffers: Buffers
    opt_state: PyTree
    key: Key

    def __repr__(self) -> str:
        return repr(tree.summary(self, depth=1))

    def _repr_html_(self) -> str:
        return tree.summary(self, depth=1)._repr_html_()


def create_state(
    model: Model,
    tx: GradientTransformation,
    key: Key,
    *,
    device: torch.device | str | None = None,
    params: Params | None = None,
    buffers: Buffers | None = None,
    memory_format: torch.memory_format | None = None,
) -> TrainState:
    """The initial state of a run: a function of its arguments only.

    Args:
        model: initializes parameters and buffers that are not given.
        tx: initializes the optimizer state.
        key: the root of all randomness of the run: initial values (``model.init(random.split(key)[0])``), dropout,
            augmentation.
        device: of the state; None is the device of ``key``. On ``"meta"`` it has only shapes and dtypes.
        params: initial parameters (copied), for instance of an earlier stage.
        buffers: initial buffers (copied).
        memory_format: of the 4-d parameters; ``torch.channels_last`` is faster for convolutions, if the images have it
            too.

    Raises:
        ValueError: ``params`` or ``buffers`` do not have the names of the model.

    Example:
        >>> import torch
        >>> from holofunc import lift, optim, random, train
        >>> state = train.create_state(lift(torch.nn.Linear, 3, 2), optim.sgd(0.1), random.key(0))
        >>> state.step, list(state.params)
        (tensor(0), ['weight', 'bias'])
    """
    tx = as_transformation("tx", tx)
    if not isinstance(model, Model) or not isinstance(key, Tensor):
        what, given = ("model", model) if not isinstance(model, Model) else ("key", key)
        wanted = "a holofunc.Model" if what == "model" else "one of holofunc.random.key"
        raise TypeError(f"{what} must be {wanted}, got {given!r}")
    device = torch.device(device) if device is not None else key.device
    init_key, run_key = random.split(key)
    if params is None or buffers is None:
        fresh_params, fresh_buffers = model.init(init_key, device=device)
        params = fresh_params if params is None else params
        buffers = fresh_buffers if buffers is None else buffers
    model.check(params, buffers)

    def place(x: Tensor) -> Tensor:
        placed = x.detach().to(device)
        return placed.to(memory_format=memory_format) if memory_format is not None and x.ndim == 4 else placed

    params = {name: place(p) for name, p in params.items()}
    buffers = {name: place(b) for name, b in buffers.items()}
    step = torch.zeros((), dtype=torch.int64, device=device)
    return tree.clone(TrainState(step, params, buffers, tx.init(params), run_key.to(device)))
