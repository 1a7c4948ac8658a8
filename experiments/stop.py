"""Ctrl-C and SIGTERM as a request: the first asks the ranks to save and end, the second ends them at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

MESSAGE = "stopping: saving what there is (Ctrl-C again to stop at once)\n"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While entered, stop signals create `stop_file` instead of ending the process.

    Outside the main thread, where Python takes no handlers, and for a signal that is ignored (nohup), nothing changes.

    Args:
        stop_file: what the ranks look for.
        numbers: the signals.
        at_once: called, in the signal handler, at every signal after the first; None only counts.
        announce: whether to say on stderr what is going on.
    """

    def __init__(
        self,
        stop_file: Path,
        numbers: tuple[signal.Signals, ...] = STOP_SIGNALS,
        at_once: Callable[[], None] | None = None,
        announce: bool = True,
    ) -> None:
        self.received: list[str] = []
        self._stop_file = stop_file
        self._numbers = numbers
        self._at_once = at_once
        self._announce = announce
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether at least one signal came, here or to whoever else makes the stop file."""
        return len(self.received) > 0 or self._stop_file.exists()

    @property
    def by(self) -> str:
        """Who asked, for messages."""
        return self.received[0] if self.received else "the job that started the ranks"

    @property
    def urgent(self) -> bool:
        """Whether a second one came."""
        return len(self.received) > 1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
        if not self.urgent:
            self._stop_file.touch()
            if self._announce:
                os.write(2, MESSAGE.encode())  # not print: it may be the very thing that was interrupted
        elif self._at_once is not None:
            self._at_once()
