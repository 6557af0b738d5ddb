"""BatchNorm whose statistics stand still."""

import torch

from holofunc import random
from holofunc.models.detection import FrozenBatchNorm2d


def test_a_frozen_norm_is_torchs_in_eval_mode():
    values = {n: random.uniform(random.key(4), (6,), low=0.5, high=1.5) for n in ("weight", "bias", "running_mean")}
    norm, reference = FrozenBatchNorm2d(6), torch.nn.BatchNorm2d(6).eval()
    for module in (norm, reference):
        module.load_state_dict(values, strict=False)
    x = random.normal(random.key(5), (2, 6, 3, 3))
    torch.testing.assert_close(norm.train()(x), reference(x))
