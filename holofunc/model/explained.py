"""Clearer errors for forward passes that torch cannot transform: they name the submodule and a workaround."""

__all__ = ["explained"]

REASONS = (
    (
        ("Batch norm got a batched tensor",),
        "normalizes over the batch, and one sample under vmap has none: use train=False (with buffers that a pass over "
        "the batch in train mode has renewed), or a model with GroupNorm",
    ),
    (
        ("saved tensor hooks",),
        "sets hooks on saved tensors, which torch.func does not allow. Calls of torch.utils.checkpoint.checkpoint are "
        "taken care of, by its name in a module or by an attribute of the network; for all else use "
        "train.supervised(remat=...), or build it without",
    ),
    (
        ("must override the setup_context staticmethod",),
        "calls a torch.autograd.Function that torch.func cannot differentiate (a module's full backward hook is one, "
        "too): give it a setup_context, or leave it out",
    ),
    (
        ("Tensor.requires_grad_()",),
        "takes a gradient with torch.autograd, which torch.func cannot differentiate: take it with torch.func.grad",
    ),
    (
        ("version_counter for inference tensor",),
        "uses torch.inference_mode, whose tensors torch.func cannot transform: use torch.no_grad",
    ),
    (
        ("requires_grad flags of leaf variables",),
        "sets requires_grad of a parameter while it runs: set it in the constructor, or detach the parameter",
    ),
    (
        ("data pointer of Tensor that doesn't have storage",),
        "reads memory (as NumPy does, and the packing of sequences), which torch.func has no rule for: write it "
        "with functions of torch",
    ),
    (
        ("Expected more than 1 value per channel",),
        "normalizes over a batch, and one image has no variance: leave a last batch of one image out (drop_last=True), "
        "or use GroupNorm",
    ),
    *(
        (
            (words,),
            "has parameters of another dtype than what it is given: make the images float32, as data.Batches does",
        )
        for words in ("must have the same dtype", "bias type", "weight type")
    ),
    *(
        (
            ("vmap", reading),
            "reads values of tensors, which under vmap are many: write it with torch.where, or loop over the samples",
        )
        for reading in ("item()", "data-dependent")
    ),
)
"""Words that all occur in a message of torch, and what to say instead."""


def explained(error: Exception, where: str) -> Exception | None:
    """A clearer error, if there is one."""
    message = str(error)
    reason = next((reason for words, reason in REASONS if all(word in message for word in words)), None)
    return ValueError(f"{where} {reason}") if reason else None
