"""Evaluate how well `metagradient` and approximations predict retraining, by the fraction of samples left out.

For each training, a population is retrained without a random part of the samples, with the same initial values and
order of batches. The score is the rank correlation of their validation losses with the predictions (linear datamodeling
score). There are two metagradients: at weights of one, and at the mean weight of the subsets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from holofunc import analysis, data, lift, losses, optim, random, train

TRAININGS: dict[str, tuple[Callable[[], Any], int]] = {
    "SGD, 60 steps": (lambda: optim.sgd(0.05), 60),
    "SGD and momentum, 60 steps": (lambda: optim.sgd(0.05, momentum=0.9), 60),
    "SGD and momentum, 120 steps": (lambda: optim.sgd(0.05, momentum=0.9), 120),
    "Adam, 60 steps": (lambda: optim.adam(3e-3, eps_root=1e-8), 60),
}
LEFT_OUT = (0.05, 0.2, 0.5)


def network() -> nn.Module:
    """An MLP with a smooth activation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def scores_of(name: str, count: int, members: int, shares: tuple[float, ...], short: int) -> dict[float, list[float]]:
    """For each fraction left out: scores of the metagradients, TracIn, final gradient products and the loss."""
    make, steps = TRAININGS[name]
    tx, steps = make(), steps // short
    images, labels = data.digits("train")
    pixels, model = images.float(), lift(network)
    objective = train.supervised(model, losses.cross_entropy)
    inner = train.make_train_step(analysis.weighted(objective), tx)
    held_out = pixels[1000:1400], labels[1000:1400]

    def step(state: Any, batch: Any, weights: Tensor) -> Any:
        x, y, places = batch
        return inner(state, (x, y, weights[places]))

    def validation(state: Any) -> Tensor:
        return objective(state.params, state.buffers, held_out, random.key(0))[0]

    orders = [random.permutation(random.fold_in(random.key(1), i), count)[: count // 3] for i in range(steps)]
    batches = [(pixels[places], labels[places], places) for places in orders]
    start = train.create_state(model, tx, random.key(0))

    def derivative(weight: float) -> analysis.Metagradient:
        return analysis.metagradient(step, start, batches, validation, meta=torch.full((count,), weight))

    whole = derivative(1.0)
    states = [start]
    for batch in batches:
        states.append(step(states[-1], batch, torch.ones(count))[0])
    samples, tests = (pixels[:count], labels[:count]), (held_out[0][:100], held_out[1][:100])
    kept = [(state.params, state.buffers) for state in states[:: max(1, steps // 6)]]
    in_course = -analysis.tracin(objective, kept, samples, tests).mean(0)
    in_the_end = -analysis.influence(objective, whole.final.params, {}, samples, tests).mean(0)
    loss = analysis.per_sample_losses(objective, whole.final.params, {}, samples)["loss"]
    found = {}
    for share in shares:
        subsets = random.bernoulli(random.key(2), (members, count), 1 - share).float()
        population = analysis.stack([start] * members)
        for batch in batches:
            population, _ = torch.vmap(step, in_dims=(0, None, 0))(population, batch, subsets)
        outcomes = torch.vmap(validation)(population)
        foretold = (whole.meta, derivative(1 - share).meta, in_course, in_the_end, -loss)
        found[share] = [float(analysis.datamodeling_score(each, subsets, outcomes)) for each in foretold]
    return found


def main(
    count: int = 300,
    members: int = 200,
    trainings: tuple[str, ...] = tuple(TRAININGS),
    shares: tuple[float, ...] = LEFT_OUT,
    short: int = 1,
) -> dict[tuple[str, float], list[float]]:
    """Print the table and return it; ``short`` divides the numbers of steps."""
    print(f"{count} digits, {members} retrainings each")
    heads = ("at 1", "at mean", "TracIn", "in the end", "minus loss")
    print(f"{'':<29}{'left out':>9}" + "".join(f"{head:>12}" for head in heads))
    table = {}
    for name in trainings:
        for share, found in scores_of(name, count, members, shares, short).items():
            table[name, share] = found
            print(f"{name:<29}{share:>9.0%}" + "".join(f"{score:>12.2f}" for score in found), flush=True)
    return table


if __name__ == "__main__":
    main()
