"""Every loss and box operator, forward and backward, eager and compiled, against pylocron's.

Prints milliseconds (medians of interleaved runs) and the ratio ours / theirs: below 1 is faster. Run as
``python tests/benchmarks/bench_losses.py [name ...]``; names select rows. Graph breaks are allowed on both sides:
pylocron's need them; that ours have none is what the laws test.
"""

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import losses, random
from holofunc.compile.memory import keep_freed_memory
from holofunc.ops import boxes

warnings.filterwarnings("ignore")  # pylocron compiles a torch.jit class when it is imported

import holocron.nn.functional as theirs_nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from holocron.ops import boxes as theirs_boxes  # noqa: E402


class Case(NamedTuple):
    """Two functions of ``(differentiated, *constants)`` and their arguments."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    reference: str = "pylocron"


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases() -> list[Case]:
    vector, dense = draw((256, 1000), 0), draw((4, 21, 128, 128), 1)
    labels = torch.randint(0, 1000, (256,), generator=torch.Generator().manual_seed(2))
    pixels = torch.randint(0, 21, (4, 128, 128), generator=torch.Generator().manual_seed(3))
    soft, multi = draw((256, 1000), 4).softmax(1), (draw((256, 1000), 5) > 1.5).float()
    regions = torch.nn.functional.one_hot(pixels, 21).movedim(-1, 1).float()
    maps, where = draw((8, 200, 14, 14), 6), torch.randint(0, 100, (8, 14, 14))
    frames, texts = draw((64, 32, 80), 7), torch.randint(1, 80, (32, 12))
    corner = draw((256, 2), 8)
    some = torch.cat([corner, corner + draw((256, 2), 9).abs() + 0.1], 1)
    corner = draw((256, 2), 10)
    others = torch.cat([corner, corner + draw((256, 2), 11).abs() + 0.1], 1)
    key = random.key(0)
    full = torch.full((32,), 64), torch.full((32,), 12)

    rows = []
    for shape, x, t in (("vector", vector, labels), ("dense", dense, pixels)):
        rows += [
            Case(f"cross_entropy/{shape}", losses.cross_entropy, F.cross_entropy, (x, t), "torch"),
            Case(f"focal/{shape}", losses.focal, theirs_nn.focal_loss, (x, t)),
            Case(f"poly/{shape}", losses.poly, theirs_nn.poly_loss, (x, t)),
            Case(
                f"complement_cross_entropy/{shape}",
                losses.complement_cross_entropy,
                theirs_nn.complement_cross_entropy,
                (x, t),
            ),
        ]
    rows += [
        Case("poly/soft", losses.poly, theirs_nn.poly_loss, (vector, soft)),
        Case(
            "multilabel_cross_entropy",
            losses.multilabel_cross_entropy,
            theirs_nn.multilabel_cross_entropy,
            (vector, multi),
        ),
        Case(
            "binary_cross_entropy",
            losses.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
            (vector, multi),
            "torch",
        ),
        Case(
            "mutual_channel/dense",
            functools.partial(losses.mutual_channel, key=key),
            theirs_nn.mutual_channel_loss,
            (maps, where),
        ),
        Case(
            "dice",
            functools.partial(losses.dice, absent="count", squared=False),
            lambda x, t: theirs_nn.dice_loss(x.softmax(1), t),
            (dense, regions),
        ),
        Case(
            "ctc",
            losses.ctc,
            lambda x, t: F.ctc_loss(x.log_softmax(-1), t, *full),
            (frames, texts),
            "torch",
        ),
        Case("box_giou", boxes.box_giou, theirs_boxes.box_giou, (some, others)),
        Case("diou_loss", boxes.diou_loss, theirs_boxes.diou_loss, (some, others)),
        Case("ciou_loss", boxes.ciou_loss, theirs_boxes.ciou_loss, (some, others)),
        Case("iou_penalty", boxes.iou_penalty, theirs_boxes.iou_penalty, (some, others)),
        Case("aspect_ratio", boxes.aspect_ratio, theirs_boxes.aspect_ratio, (some.repeat(256, 1),)),
        Case(
            "aspect_ratio_consistency",
            boxes.aspect_ratio_consistency,
            theirs_boxes.aspect_ratio_consistency,
            (some, others),
        ),
        Case(
            "ciou_loss/paired",
            functools.partial(boxes.ciou_loss, paired=True),
            lambda a, b: theirs_boxes.ciou_loss(a, b).diagonal(),
            (some, others),
        ),
    ]
    return rows


def runner(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Callable[[], None]:
    """One forward and backward pass."""
    x = args[0].clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(fn(x, *args[1:]).sum(), x)

    return run


def time_pair(ours: Callable[[], None], theirs: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Median milliseconds of both, run in alternation for about `seconds`."""
    for fn in (ours, theirs, ours, theirs):
        fn()
    spent: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(spent[0]) < 5:
        pairs = list(zip(spent, (ours, theirs), strict=True))
        for times, fn in pairs if len(spent[0]) % 2 else reversed(pairs):  # whoever follows finds warmer caches
            start = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[0]), statistics.median(spent[1])


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for both sides: ``fullgraph=True``, which pylocron's cannot all have, costs 6 us a call (torch 2.14)."""
    return torch.compile(fn, dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows whose name starts with one of these")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # fresh pages would be most of what is measured
    print(f"torch {torch.__version__}, {options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'':28}{'against':>10}{'eager ms':>10}{'theirs':>9}{'ratio':>7}{'compiled':>10}{'theirs':>9}{'ratio':>7}")
    for case in cases():
        if options.names and not case.name.startswith(tuple(options.names)):
            continue
        torch._dynamo.reset()
        eager = time_pair(runner(case.ours, case.args), runner(case.theirs, case.args), options.seconds)
        fast = time_pair(
            runner(compiled(case.ours), case.args),
            runner(compiled(case.theirs), case.args),
            options.seconds,
        )
        columns = (*eager, eager[0] / eager[1], *fast, fast[0] / fast[1])
        print(
            f"{case.name:28}{case.reference:>10}"
            + "".join(
                f"{value:{width}.{2 if width == 7 else 3}f}"
                for value, width in zip(columns, (10, 9, 7) * 2, strict=True)
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
