"""x"""

from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.transforms import add_decayed_weights, scale_by_adam, scale_by_learning_rate


def adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, mask=None) -> GradientTransformation:
    return named_chain(
        adam=scale_by_adam(b1, b2, eps),
        weight_decay=add_decayed_weights(weight_decay, mask),
        learning_rate=scale_by_learning_rate(learning_rate),
    )
