"""Runs on several ranks: joining one, starting one, and ending it on all ranks at once."""

import math
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holofunc import distributed
from holofunc.distributed.ranks import described, tell
from holofunc.train import Event, Hook, Stop
from holofunc.train.signals import REASONS

__all__ = ["end_together", "join", "leave_word", "start"]


def join(arguments: Namespace) -> torch.device | None:
    """Join the run that this process was started for, by ``torchrun`` or by `start`; its device, None if it is alone.

    Raises:
        ValueError: ``--ranks`` is out of range, or another number than was started.
    """
    asked, started = arguments.ranks, os.environ.get("WORLD_SIZE")
    if asked is not None and asked < 1:
        raise ValueError(f"ranks must be at least 1, got {asked}")
    if not 0 < arguments.rank_timeout < math.inf:
        raise ValueError(f"rank_timeout must be a positive number of seconds, got {arguments.rank_timeout:g}")
    if started is None:
        return None
    if asked is not None and asked != int(started):
        raise ValueError(f"ranks must be the {started} that were started, or left out, got {asked}")
    return distributed.init(timeout=arguments.rank_timeout)


def start(arguments: Namespace) -> Callable[[], int]:
    """What is left to do where ``--ranks`` asks for several: this command, on each of them."""
    command = [sys.executable, "-m", "holofunc", *arguments.argv]
    return lambda: distributed.run_program(command, arguments.ranks)


def end_together(every: int) -> Hook:
    """End a run after the same step on all ranks once one of them got Ctrl-C, SIGTERM or SIGHUP."""
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        caught.append(REASONS[signal.Signals(number)])

    def update(state: None, event: Event) -> tuple[None, Stop | None]:
        if event.kind == "run_start":
            for number in REASONS:  # instead of the loop's own handlers, which know of one process
                signal.signal(number, note)
        if event.kind != "step" or event.step % every:
            return None, None
        flags = torch.tensor([reason in caught for reason in REASONS.values()], device=event.info.device).float()
        for reason, count in zip(REASONS.values(), distributed.psum(flags).tolist(), strict=True):
            if count:
                return None, Stop(reason)
        return None, None

    return Hook(lambda: None, update, "decide", "end together")


@contextmanager
def leave_word() -> Iterator[None]:
    """Tell the other ranks of an error on this one, so that theirs names it."""
    try:
        yield
    except BaseException as error:
        tell(described(error))
        raise
