"""SIGINT and SIGTERM: training stops after the iteration in hand, with a checkpoint; everything else stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cssbench.progress import say

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ended the command; its exit code is 128 + `number`. No KeyboardInterrupt: typer makes 130 of that."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """`received`: the number of the signal that asks to stop, or 0. `patient`: whether it is looked at, so that the
    first one need not end the process."""

    def __init__(self) -> None:
        self.received, self.patient = 0, False

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.received or not self.patient:
            raise Interrupted(number)
        self.received = number
        say(f"{signal.Signals(number).name}: stopping after this iteration, with a checkpoint; once more stops at once")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, whoever trains looks at `received`."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


@contextmanager
def listening() -> Iterator[Signals]:
    """Handles `STOPPING` inside, where this is the main thread; elsewhere nothing is ever received. A signal that is
    ignored, as SIGINT is by what a shell script starts in the background, stays so."""
    found, before = Signals(), {}
    try:
        for number in STOPPING:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, found.handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
