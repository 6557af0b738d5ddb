"""Recurrent networks step by step, for keyed dropout and for derivatives that torch's own lack."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.model.drop import drop
from holofunc.model.sites import Rule, Site

__all__ = ["RECURRENT"]

Step = Callable[..., tuple[Tensor, ...]]
"""``step(x, state, w_hh, b_hh, ...) -> state`` of what the inputs add, the hidden state first."""


def _elman(act: Callable[[Tensor], Tensor], x: Tensor, state: tuple[Tensor, ...], *weights: Any) -> tuple[Tensor, ...]:
    return (act(x + F.linear(state[0], *weights)),)


def _gru(x: Tensor, state: tuple[Tensor, ...], *weights: Any) -> tuple[Tensor, ...]:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = F.linear(state[0], *weights).chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    return ((1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * state[0],)


def _lstm(x: Tensor, state: tuple[Tensor, ...], w_hh: Tensor, b_hh: Any, w_hr: Any = None) -> tuple[Tensor, ...]:
    i, f, g, o = (x + F.linear(state[0], w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _by_steps(
    step: Step, site: Site, x: Tensor, starts: Any, weights: Any, has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Torch's function of the same arguments, computed step by step."""
    x = x.transpose(0, 1) if batch_first else x
    starts = starts if isinstance(starts, (tuple, list)) else (starts,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        if layer and train and dropout:
            x = drop(x, dropout, key=site.key())
        outs = []
        for direction in range(directions):
            w_ih, w_hh, *rest = weights[each * len(ends) : each * (len(ends) + 1)]
            b_ih, b_hh, *rest = rest if has_biases else (None, None, *rest)
            state = tuple([s[len(ends)] for s in starts])
            steps = F.linear(x, w_ih, b_ih).unbind(0)
            hidden = []
            for inputs in reversed(steps) if direction else steps:
                state = step(inputs, state, w_hh, b_hh, *rest)
                hidden.append(state[0])
            outs.append(torch.stack(hidden[::-1] if direction else hidden))
            ends.append(state)
        x = torch.cat(outs, -1)
    return (x.transpose(0, 1) if batch_first else x, *(torch.stack(end) for end in zip(*ends, strict=True)))


def _recurrent(function: Callable[..., Any], step: Step) -> Rule:
    def rule(site: Site, *args: Any) -> Any:
        padded = isinstance(args[3], bool)  # has_biases; packed sequences have one more argument
        dropout, train = args[5:7] if padded else args[6:8]
        if train and dropout and not padded:
            return site.refuse(
                f"draws dropout={dropout} between the layers of a recurrent network, on packed sequences",
                "build it with dropout=0, or of networks of one layer with nn.Dropout between them",
            )
        if train and dropout:
            return _by_steps(step, site, *args)
        if torch.compiler.is_compiling():
            return NotImplemented
        try:
            return function(*args)
        except RuntimeError as error:
            if not padded or not any(words in str(error) for words in LACKING):
                raise
            return _by_steps(step, site, *args)

    return rule


LACKING = ("forward AD", "broadcast shape")
"""Words of errors about a derivative or a rule for vmap that torch does not have."""
RECURRENT: dict[Any, Rule] = {
    torch.lstm: _recurrent(torch.lstm, _lstm),
    torch.gru: _recurrent(torch.gru, _gru),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, lambda *args: _elman(torch.tanh, *args)),
    torch.rnn_relu: _recurrent(torch.rnn_relu, lambda *args: _elman(torch.relu, *args)),
}
