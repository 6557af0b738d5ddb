"""Models as pairs of pure functions ``(init, apply)`` over flat dicts of tensors.

An architecture is an ordinary `torch.nn.Module`, built on the meta device: a skeleton without storage. `Model.apply`
evaluates it on the caller's parameters and buffers with `torch.func.functional_call`, and returns the new buffers
instead of writing them anywhere. Train and eval mode are two skeletons, so nobody calls ``.train()``.

Every random draw in a forward pass (`torch.nn.functional.dropout`, `torch.rand`, a tensor's ``bernoulli_``) has its own
key: the caller's, folded with the path of the submodule and the index of the call. Draws that cannot be keyed are
errors. Writes into the caller's tensors go to copies.
"""

from holofunc.model.core import Model, from_module, lift
from holofunc.model.drop import Drop, drop, site_key
from holofunc.model.skeleton import ChecksInput
from holofunc.model.table import Table

__all__ = ["ChecksInput", "Drop", "Model", "Table", "drop", "from_module", "lift", "site_key"]
