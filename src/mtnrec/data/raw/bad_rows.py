"""Rows that break the format: refused, or skipped and counted."""

import logging
from collections import Counter

from mtnrec.checks import InputError

_MOST_SKIPPED = 1_000_000  # finding a bad row takes up to 0.3 ms

_logger = logging.getLogger(__name__)


class BadRows:
    """Policy for rows that break the format: refuse the first, or skip and count all.

    Args:
        on_error: ``refuse`` or ``skip``.
    """

    CHOICES = ("refuse", "skip")

    def __init__(self, on_error: str) -> None:
        self._skip = on_error == "skip"
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Number of skipped rows."""
        return self._counts.total()

    def add(self, where: str, rule: str, found: str) -> None:
        """Refuse a row, or count it.

        Raises:
            InputError: If rows are refused, or too many were skipped for a genuine log.
        """
        message = f"{where}: {rule}, got {found}"
        if not self._skip:
            raise InputError(f"{message}. Set data.on_error=skip to skip and count such rows.")
        if self.count == _MOST_SKIPPED:
            raise InputError(
                f"{message}, after {_MOST_SKIPPED:,} skipped rows. Download the file again."
            )
        self._counts[rule] += 1
        self._first.setdefault(rule, message)

    def warn(self) -> None:
        """Log per rule how many rows broke it, and the first of them."""
        for rule, count in self._counts.items():
            _logger.warning("skipped %d rows; the first: %s", count, self._first[rule])
