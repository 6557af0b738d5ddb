"""``holofunc explain``: which images a network finds hard, as a page with pictures and a table."""

import base64
import csv
import dataclasses
import functools
import html
import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holofunc import analysis, optim, tree
from holofunc.cli import job
from holofunc.cli.options import given, version
from holofunc.cli.runs import check_writable, outputs_of, say, stored, trained
from holofunc.cli.task import Opened
from holofunc.config import Config, override
from holofunc.model import Model
from holofunc.train import TrainState
from holofunc.typing import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["explain"]

MEANINGS = {
    "loss": "the loss of the image by itself, label smoothing aside",
    "el2n": "the distance of the probabilities from the target (Paul et al., 2021)",
    "grad_norm": "the norm of the gradient of the image's loss",
    "entropy": "how undecided the network is, in nats",
    "margin": "the probability of the target, minus that of the best other class; lowest first",
    "probability": "the probability of the target; lowest first",
    "iou": "the mean IoU of the classes in the image; lowest first",
}
"""What the scores say, and how they are sorted if not by the highest."""


def explain(arguments: Namespace) -> Callable[[], int]:
    """``holofunc explain``: score every image of a run's data, and show those that stand out."""
    folder = Path(arguments.run)
    if arguments.count < 1:
        raise ValueError(f"count must be at least 1, got {arguments.count}")
    config = override(stored(folder), given(arguments))
    config = dataclasses.replace(config, device=job.device(config.device), label_smoothing=0.0)
    config, source = job.open_data(config, PARTS[arguments.part])
    model, state, step = trained(config, folder, arguments.step)
    check_writable(folder)

    def carry_out() -> int:
        size = len(source.batches(1))
        norms = arguments.grad_norms
        report = analysis.explain(
            job.objective(config, model),
            dict(optim.eval_params(state.opt_state, state.params)),
            dict(state.buffers),
            _numbered(source.batches(min(config.batch_size, size)), config.device),
            grad_norms=config.task == "classification" if norms is None else norms,
            count=min(arguments.count, size),
            progress=sys.stderr.isatty(),
        )
        title = f"{model.name} on {config.data}: {size:,} {arguments.part} images, step {step}"
        page = _page(title, config, report, source, functools.partial(_drawn, config, model, state, source))
        (folder / "explain.html").write_text(page, encoding="utf-8")
        (folder / "explain.csv").write_text(_table(config, report.stats, source), encoding="utf-8")
        width = max(map(len, report.summary)) + 2
        for name, value in report.summary.items():
            say(f"{name:{width}}{value:.4g}")
        say(f"{folder}: explain.html, explain.csv")
        return 0

    return carry_out


PARTS = {"held-out": "test", "training": "train"}
"""Which images are explained, and what their part is called."""


def _numbered(batches: Iterable[Batch], device: str) -> Iterator[Batch]:
    """Batches on the device, with the places of their samples."""
    done = 0
    for images, targets in batches:
        yield *tree.map(lambda x: x.to(device), (images, targets)), torch.arange(done, done + len(images))
        done += len(images)


def _drawn(config: Config, model: Model, state: TrainState, source: Opened, rows: Tensor) -> "Figure":
    """A picture of some samples, in this order."""
    images, targets = next(iter(source.at(rows.tolist()).batches(len(rows))))
    outputs = tree.map(torch.Tensor.cpu, outputs_of(config, model, state, images))
    return job.TASKS[config.task].draw(config, model, images, outputs, targets)


def _table(config: Config, stats: Mapping[str, Tensor], source: Opened) -> str:
    """A line per sample, with its file."""
    lines = analysis.to_csv(stats, config.classes if config.task == "classification" else None).splitlines()
    if not source.paths:
        return "\n".join(lines) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["file"], *([source.paths[i]] for i in stats["index"].tolist())])
    return "".join(f"{line},{file}\n" for line, file in zip(lines, text.getvalue().splitlines(), strict=True))


# --- the page ----------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #333; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin: 2em 0 0 } img { max-width: 100% }
table { border-collapse: collapse; font-size: 13px } th, td { padding: 2px 12px 2px 0; text-align: left }
th { border-bottom: 1px solid #ccc } p { margin: .2em 0 .8em; color: #666 }
"""


def _page(
    title: str, config: Config, report: analysis.Report, source: Opened, draw: Callable[[Tensor], "Figure"]
) -> str:
    """Everything in one file: what was measured, and of each score the images that stand out."""
    numbers = [[name, f"{value:.4g}"] for name, value in report.summary.items()]
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(["over all images", ""], numbers)]
    for score, rows in report.worst.items():
        parts += [f"<h2>{score}</h2>", f"<p>{_meaning(score)}</p>", _picture(draw(rows["index"]), score)]
        listed = list(csv.reader(_table(config, rows, source).splitlines()))
        parts.append(_html_table(listed[0], [[_short(each) for each in row] for row in listed[1:]]))
    about = f"holofunc {version()}, torch {torch.__version__}"
    style = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{style}</head><body>{''.join(parts)}<p>{about}</p></body></html>\n"


def _meaning(score: str) -> str:
    return MEANINGS.get(score, f"the part {score.removeprefix('loss/')} of the image's loss")


def _picture(figure: "Figure", name: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}'>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _short(cell: str) -> str:
    """A number with four digits; a text as it is."""
    try:
        return cell if cell.lstrip("-").isdecimal() else f"{float(cell):.4g}"
    except ValueError:
        return cell
