"""Rows that break the format."""

import logging
from collections import Counter

from mtnrec.checks import InputError

_MOST_SKIPPED = 1_000_000  # to find a bad row takes up to 0.3 ms

_logger = logging.getLogger(__name__)


class BadRows:
    """What becomes of rows that break the format: the first is refused, or all are counted.

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
        """Rows that were skipped."""
        return self._counts.total()

    def add(self, where: str, rule: str, found: str) -> None:
        """Refuse a row, or count it.

        Raises:
            InputError: Unless such rows are skipped; if there are too many for a log with defects.
        """
        message = f"{where}: {rule}, got {found}"
        if not self._skip:
            raise InputError(f"{message} (data.on_error=skip skips and counts such rows)")
        if self.count == _MOST_SKIPPED:
            raise InputError(
                f"{message}; {_MOST_SKIPPED:,} rows were skipped before: fetch the file again"
            )
        self._counts[rule] += 1
        self._first.setdefault(rule, message)

    def warn(self) -> None:
        """Log how many rows broke each rule, and the first of them."""
        for rule, count in self._counts.items():
            _logger.warning("skipped %d rows; the first: %s", count, self._first[rule])
