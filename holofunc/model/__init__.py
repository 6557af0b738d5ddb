"""Models as pairs of pure functions ``(init, apply)`` over flat dicts of tensors.

An architecture is an ordinary `torch.nn.Module`, built on the meta device: a skeleton without storage. `Model.apply`
evaluates it on the caller's parameters and buffers with `torch.func.functional_call`, and returns the new buffers
instead of writing them anywhere. Train and eval mode are two skeletons, so nobody calls ``.train()``.

Randomness is keyed at the level of calls: whatever a forward pass draws (`torch.nn.functional.dropout`, `torch.rand`, a
tensor's ``bernoulli_``) it draws from a key of its own, the caller's folded with the module's path and the number of
the call. What cannot be keyed is refused. Writes into the caller's tensors go to copies.
"""

from holofunc.model.core import Model, from_module, lift
from holofunc.model.drop import Drop, drop, site_key
from holofunc.model.skeleton import ChecksInput
from holofunc.model.table import Table

__all__ = ["ChecksInput", "Drop", "Model", "Table", "drop", "from_module", "lift", "site_key"]
