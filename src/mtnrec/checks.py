"""Input error, and the checks that several constructors share."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """Invalid user input; the message names rule, value and remedy.

    The entry points print it without a traceback and end with exit status 1.
    """


def check_integer(name: str, value: Any, *, minimum: int, maximum: float = math.inf) -> None:
    """Refuse anything but an integer from ``minimum`` to ``maximum``.

    >>> check_integer("batch_size", 0, minimum=1)
    Traceback (most recent call last):
    mtnrec.checks.InputError: batch_size must be an integer >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        rule = f">= {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise InputError(f"{name} must be an integer {rule}, got {value!r}")


def check_number(
    name: str, value: Any, *, minimum: float, maximum: float = math.inf, open_maximum: bool = False
) -> None:
    """Refuse anything but a finite number in ``[minimum, maximum]`` (or ``[minimum, maximum)``).

    >>> check_number("dropout", 1.0, minimum=0, maximum=1, open_maximum=True)
    Traceback (most recent call last):
    mtnrec.checks.InputError: dropout must be a number in [0, 1), got 1.0
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or not minimum <= value <= maximum
        or (open_maximum and value == maximum)
    ):
        upper = f"{maximum:g}{')' if open_maximum else ']'}" if maximum < math.inf else "inf)"
        raise InputError(f"{name} must be a number in [{minimum:g}, {upper}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse anything but one of ``choices``.

    >>> check_choice("coupling", "both", ["gradient", "decoupled"])
    Traceback (most recent call last):
    mtnrec.checks.InputError: coupling must be one of gradient, decoupled; got 'both'
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but true or false.

    >>> check_flag("frobenius", "yes")
    Traceback (most recent call last):
    mtnrec.checks.InputError: frobenius must be true or false, got 'yes'
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")


def find_duplicates(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted.

    >>> find_duplicates(["price", "age", "price"])
    ['price']
    """
    return sorted(name for name, times in Counter(names).items() if times > 1)


def format_names(names: Sequence[str]) -> str:
    """Quote at most five names for a message.

    >>> format_names(["price", "age"])
    "'price', 'age'"
    >>> format_names("abcdefg")
    "'a', 'b', 'c', 'd', 'e', … (7 in all)"
    """
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown}, … ({len(names)} in all)"
