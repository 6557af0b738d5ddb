"""Signals that end a run after the current step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["caught"]

REASONS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # sent when a terminal is closed; not on Windows
    REASONS[signal.SIGHUP] = "hangup"


@contextlib.contextmanager
def caught(end: Callable[[str], None]) -> Iterator[None]:
    """Call ``end(reason)`` at the first Ctrl-C, SIGTERM or SIGHUP; the second acts at once.

    Only the main thread gets signals. Ignored signals, as under ``nohup``, stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[Any, Any] = {}

    def note(number: int, frame: Any) -> None:
        signal.signal(number, before[number])
        end(REASONS[signal.Signals(number)])

    for number in REASONS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
