"""How a training loop hears that its process or node is about to end, and answers that its state is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class InterruptedRunError(Exception):
    """The run was asked to end and its state is saved; the same command goes on from there."""


class Interruption:
    """A request to save soon, set from outside the loop and looked at after every step.

    `on_saved` is called once the loop has saved: it ends the run, or returns where the node is only
    threatened, and then the loop goes on.
    """

    def __init__(self, on_saved: Callable[[], None] | None = None) -> None:
        self._asked = threading.Event()
        self._on_saved = on_saved

    @property
    def asked(self) -> bool:
        """True from a request to the call of `saved`."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Make the request; from any thread or signal handler."""
        self._asked.set()

    def saved(self) -> None:
        """The loop's answer. Raises InterruptedRunError where the run ends here."""
        self._asked.clear()
        if self._on_saved is not None:
            self._on_saved()
            return
        raise InterruptedRunError("ended on request, state saved; the same command goes on from there")


@contextlib.contextmanager
def on_sigterm(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` when this process gets SIGTERM. Python sets handlers in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
