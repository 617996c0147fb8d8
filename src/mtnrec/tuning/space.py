"""Search space of an arm: a range or a choice for each searched config key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtnrec.checks import InputError


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, drawn uniformly or, if ``log``, by their logarithm.

    Raises:
        InputError: If it is empty or not finite, or ``low`` has no logarithm.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(
                f"a range must have finite ends, the lower one first, got {self}. Swap the ends, "
                "or give one number to fix the key."
            )
        if self.log and self.low <= 0:
            raise InputError(
                f"a range on a log scale must begin above 0, got {self}. Set a small lower end, "
                "or leave out tag(log, …)."
            )

    def __str__(self) -> str:
        interval = f"interval({self.low:g},{self.high:g})"
        return f"tag(log,{interval})" if self.log else interval

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def at(self, share: float) -> float:
        """Return the value below which a share of the draws lies.

        >>> Range(1.0, 4.0, log=True).at(0.5), Range(0.0, 0.5).at(0.5)
        (2.0, 0.25)
        """
        if not self.log:
            return self.low + share * (self.high - self.low)
        value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """Values as written on the command line, drawn with equal probability.

    Raises:
        InputError: If there are fewer than two, or one is repeated.
    """

    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if len({*self.values}) < max(2, len(self.values)):
            raise InputError(
                f"a choice must have two or more different values, got {self}. Give one value to "
                "fix the key."
            )

    def __str__(self) -> str:
        return f"choice({','.join(self.values)})"

    @property
    def ends(self) -> tuple[str, str]:
        """First and last value."""
        return self.values[0], self.values[-1]

    def at(self, share: float) -> str:
        """Return the value below or at which a share in [0, 1) of the draws lies."""
        return self.values[int(share * len(self.values))]


Space = Mapping[str, Range | Choice]
Setting = Mapping[str, Any]
"""Values of the searched keys."""
