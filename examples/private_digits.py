"""Learn the digits with differential privacy, DP-SGD: `python examples/private_digits.py`.

Each sample's gradient is clipped, and noise is added to their sum. `analysis.clipped_grads` clips without storing the
gradients; the noise is a transformation with a key. The privacy budget is computed by Opacus's accountant, if it is
installed.
"""

import torch
from torch import nn

from holofunc import analysis, data, lift, losses, optim, random, train

LIMIT, MULTIPLIER, DELTA = 1.0, 1.0, 1e-4


def network() -> nn.Module:
    """GroupNorm, because BatchNorm would let samples see each other."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.Tanh(), nn.Flatten(), nn.Linear(256, 10)
    )


def epsilon(rate: float, steps: int) -> float | None:
    """The budget spent, at DELTA; None without Opacus."""
    try:
        from opacus.accountants import RDPAccountant
    except ImportError:
        return None
    accountant = RDPAccountant()
    accountant.history = [(MULTIPLIER, rate, steps)]
    return float(accountant.get_epsilon(DELTA))


def main(steps: int = 120, size: int = 256) -> float:
    """Train and print; returns the accuracy on the held-out fifth."""
    images, labels = data.digits("train")
    model = lift(network)
    objective = train.supervised(model, losses.cross_entropy)
    noise = optim.add_noise((MULTIPLIER * LIMIT / size) ** 2, gamma=0.0, key=random.key(1))
    tx = optim.chain(noise, optim.sgd(0.5, momentum=0.9))
    params, buffers = model.init(random.key(0))
    opt_state = tx.init(params)
    rate = size / len(labels)
    for i in range(steps):
        drawn = random.bernoulli(random.fold_in(random.key(2), i), labels.shape, rate)  # Poisson sampling
        batch = images[drawn], labels[drawn]
        grads = analysis.clipped_grads(objective, params, buffers, batch, max_norm=LIMIT)
        share = len(batch[1]) / size  # a sum over the batch, divided by its expected size
        updates, opt_state = tx.update({n: g * share for n, g in grads.items()}, opt_state, params)
        params = optim.apply_updates(params, updates)
    held_out, truth = data.digits("test")
    accuracy = float((model.apply(params, buffers, held_out)[0].argmax(1) == truth).double().mean())
    spent = epsilon(rate, steps)
    budget = "Opacus is not installed" if spent is None else f"epsilon {spent:.2f} at delta {DELTA}"
    print(f"accuracy on the held-out fifth: {accuracy:.1%} ({budget})")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
