"""Ctrl-C and SIGTERM: how a command ends, and its exit status."""

import signal
import threading
from typing import NoReturn

INTERRUPTED = 130  # exit status of shells after Ctrl-C
TERMINATED = 143  # and after SIGTERM
_received: set[int] = set()


def exit_on_sigterm() -> None:
    """Make SIGTERM raise ``SystemExit(143)``, unless another handler is installed.

    submitit's stays, which lets a run outlive the SIGTERM before a requeue. Lightning calls the
    installed handler after its own, which would end the process with status 0.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: object) -> NoReturn:
    _received.add(signum)
    raise SystemExit(TERMINATED)


def got_sigterm() -> bool:
    """Return whether SIGTERM ended this process, not one of its workers."""
    return signal.SIGTERM in _received


def interrupt_status(error: BaseException) -> int | None:
    """Return the exit status if Ctrl-C or SIGTERM raised an error, else None.

    >>> interrupt_status(KeyboardInterrupt()), interrupt_status(SystemExit(1))
    (130, None)
    """
    # Lightning turns Ctrl-C into SystemExit(1), and SIGTERM into a SystemExit without a status.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and error.code in (None, TERMINATED):
        return TERMINATED
    return INTERRUPTED if isinstance(error, SystemExit) and error.code == INTERRUPTED else None
