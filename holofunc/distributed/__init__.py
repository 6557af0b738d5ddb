"""Training on several ranks: pure functions over `torch.distributed`, without wrapping the model.

Each rank is a process with a whole copy of the training state, which takes its part of each batch
(`holofunc.data.Batches.shard`), and runs the same step: `average_gradients` in front of the optimizer makes the updates
equal. In one process everything here is the identity, so that one script serves both.

    device = distributed.init()
    batches = batches.shard(distributed.rank(), distributed.world_size())
    tx = optim.chain(distributed.average_gradients(), optim.adamw(1e-3))

``torchrun --nproc-per-node=4 script.py`` starts the ranks, or `launch` from a notebook.
"""

from holofunc.distributed.averaging import AverageGradientsState, average_gradients, fold, over_ranks
from holofunc.distributed.collectives import all_gather, pmean, psum, reduce_scatter
from holofunc.distributed.launch import init, launch, run_program
from holofunc.distributed.layers import sync_batch_norm, sync_dropout
from holofunc.distributed.ranks import RankError, fingerprint, is_rank_zero, rank, rank_zero, world_size
from holofunc.distributed.saving import restore_sharded, save_sharded
from holofunc.distributed.sharding import ShardState, gather, shard, share

__all__ = [
    "AverageGradientsState",
    "RankError",
    "ShardState",
    "all_gather",
    "average_gradients",
    "fingerprint",
    "fold",
    "gather",
    "init",
    "is_rank_zero",
    "launch",
    "over_ranks",
    "pmean",
    "psum",
    "rank",
    "rank_zero",
    "reduce_scatter",
    "restore_sharded",
    "run_program",
    "save_sharded",
    "shard",
    "share",
    "sync_batch_norm",
    "sync_dropout",
    "world_size",
]
