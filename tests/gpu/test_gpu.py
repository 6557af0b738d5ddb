"""What holds on a GPU; skipped without one. ``python -m pytest -m gpu`` takes at most eight minutes on one device."""

import statistics
import time

import pytest
import torch
import torchvision
from torch._dynamo.utils import counters

from holofunc import jit, lift, losses, models, optim, random, train, tree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODES = [None, "reduce-overhead"]


def setup(model, tx=None, size=32, batch=16, precision="fp32", channels_last=False):
    tx = tx or optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    memory_format = torch.channels_last if channels_last else None
    step = train.make_train_step(train.supervised(model, losses.cross_entropy, precision=precision), tx)
    state = train.create_state(model, tx, random.key(0), device="cuda", memory_format=memory_format)
    images = random.normal(random.key(1, device="cuda"), (batch, 3, size, size))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return step, state, (images, torch.arange(batch, device="cuda") % 10)


def small():
    return lift(
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(7200, 10),
        )
    )


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode, donate):
    step, state, batch = setup(small())
    fast, mine = jit(step, donate=donate, mode=mode), tree.map(torch.clone, state)
    for _ in range(4):
        state, expected = step(state, batch)
        mine, found = fast(mine, batch)
        torch.testing.assert_close(found["loss"].clone(), expected["loss"], rtol=1e-3, atol=1e-4)
        mine = mine if donate else tree.map(torch.clone, mine)
    for a, b in zip(tree.leaves(mine), tree.leaves(state), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_no_breaks_and_no_recompiles(mode):
    step, state, batch = setup(small(), optim.multi_steps(optim.adamw(optim.schedules.cosine(1e-3, 10)), 2))
    fast = jit(step, donate=True, mode=mode)
    state, _ = fast(state, batch)
    counters.clear()
    for _ in range(6):
        state, _ = fast(state, batch)
    assert fast.num_graphs == 1
    assert counters["stats"].get("unique_graphs", 0) == 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision(channels_last):
    step, state, batch = setup(models.resnet18(num_classes=10), precision="bf16", channels_last=channels_last)
    fast = jit(step, donate=True)
    first = None
    for _ in range(20):
        state, measured = fast(state, batch)
        first = first if first is not None else float(measured["loss"])
    assert float(measured["loss"]) < first


def test_a_donating_step_needs_no_second_state():
    step, state, batch = setup(models.resnet18(num_classes=10))
    fast = jit(step, donate=True)
    for _ in range(2):
        state, _ = fast(state, batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state, _ = fast(state, batch)
    size = sum(x.numel() * x.element_size() for x in tree.leaves(state))
    assert torch.cuda.memory_allocated() - before < size / 10


def theirs(module, images, labels, mode, precision):
    module = module.cuda().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(module, mode=mode)

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


@pytest.mark.parametrize(
    ("name", "size", "batch", "precision"), [("resnet18", 32, 64, "fp32"), ("resnet50", 224, 128, "bf16")]
)
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
def test_print_ratios_of_steps(name, size, batch, precision, mode, capsys):
    step, state, (images, labels) = setup(
        getattr(models, name)(num_classes=10), optim.adamw(1e-3), size, batch, precision, channels_last=True
    )
    fast, held = jit(step, donate=True, mode=mode), [state]

    def ours():
        held[0], _ = fast(held[0], (images, labels))

    other = theirs(getattr(torchvision.models, name)(num_classes=10), images, labels, mode, precision)
    times = {"ours": [], "theirs": []}
    for _ in range(30):
        for which, run in (("ours", ours), ("theirs", other)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[which].append(time.perf_counter() - began)
    medians = {which: 1e3 * statistics.median(found[10:]) for which, found in times.items()}
    with capsys.disabled():
        ratio = medians["ours"] / medians["theirs"]
        print(f"\n{name} {size} px, batch {batch}, {precision}, {mode}: {ratio:.2f}x ({medians})")
