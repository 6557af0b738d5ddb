"""Two GPUs and NCCL against one: `torchrun --nproc-per-node=2 tests/gpu/check_distributed.py`.

Says so, and ends well, where there are no two GPUs. Compiled and eager steps, with `average_gradients` and with `shard`,
over 30 steps: the ranks agree to the last bit, and with one GPU that sees the whole batch to 1e-4.
"""

import torch
from torch import nn

from holofunc import data, distributed, jit, lift, losses, optim, random, train, tree


def network() -> nn.Module:
    convolution = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(8 * 36, 10))


def trained(tx: optim.GradientTransformation, rank: int, world: int, device: torch.device, compiled: bool) -> dict:
    images, labels = data.digits("train")
    batches = data.Batches((images[:256], labels[:256]), 64, key=random.key(0)).shard(rank, world)
    model = distributed.sync_batch_norm(lift(network)) if world > 1 else lift(network)
    state = train.create_state(model, tx, random.key(1), device=device)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    step = jit(step, donate=True) if compiled else step
    for epoch in range(8):
        for batch in batches.epoch(epoch):
            state, _ = step(state, tree.map(lambda x: x.to(device), batch))
    return tree.map(torch.clone, state.params)


def main() -> None:
    if torch.cuda.device_count() < 2:
        print(f"skipped: two GPUs are needed, there are {torch.cuda.device_count()}")
        return
    device = distributed.init(timeout=300)
    rank, world = distributed.rank(), distributed.world_size()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    alone = trained(optim.sgd(0.05, momentum=0.9), 0, 1, device, False)
    contenders = {
        "average": optim.chain(distributed.average_gradients(), optim.sgd(0.05, momentum=0.9)),
        "shard": distributed.shard(optim.sgd(0.05, momentum=0.9)),
    }
    for name, tx in contenders.items():
        for compiled in (False, True):
            params = trained(tx, rank, world, device, compiled)
            distributed.fingerprint(params, values=True)
            error = max(float((params[n] - alone[n]).abs().max()) for n in alone)
            distributed.rank_zero(print)(f"{name}, compiled={compiled}: largest difference {error:.1e}")
            assert error < 1e-4, error


if __name__ == "__main__":
    main()
