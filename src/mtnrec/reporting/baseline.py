"""Baseline of each arm: the arm with the same settings that it is compared with.

Arms differ in whatever settings differ, except the seed. A *block* is a baseline with the arms that
are compared with it.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mtnrec.checks import InputError, format_names
from mtnrec.reporting.labels import Labels, as_text
from mtnrec.run.record import RunRecord

_BETWEEN_PAIRS = re.compile(r",(?=[\w.]+=)")  # values may have commas
BASELINE = "baseline"  # name of an arm without a treatment in figures


class Place(NamedTuple):
    """Place of a run in the comparisons.

    Args:
        block: Hash that an arm shares with its baseline.
        treated: Whether the arm is compared with its block's baseline; False for the baseline.
        line: Name of the arm within the block, on one line of a figure.
    """

    block: str
    treated: bool
    line: str


def place_arms(
    records: Sequence[RunRecord], labels: Sequence[Labels], baseline: str | None
) -> list[Place]:
    """Return the place of each run.

    Args:
        records: Records of the runs.
        labels: Their labels.
        baseline: Settings of the baseline, ``key=value``, for example ``optimizer.lr=1e-3`` or
            ``model=esmm,model.clicked_weight=0``. If None, the baseline is the arm without MTN and
            without a regulariser; if all or none have one, the first arm, by label, on the same
            data and noise.

    Raises:
        InputError: If no run has the settings.
    """
    treated = [bool(record.identity.treatments) for record in records]
    if baseline is None and len(set(treated)) == 2:
        return [
            Place(record.identity.baseline, is_treated, label.variant or BASELINE)
            for record, is_treated, label in zip(records, treated, labels, strict=True)
        ]
    if baseline is None:
        return _compared_with_first(records, labels)
    wanted = dict(pair.partition("=")[::2] for pair in _BETWEEN_PAIRS.split(baseline))
    is_baseline = [
        all(_is_same(_value(record, key), value) for key, value in wanted.items())
        for record in records
    ]
    if not any(is_baseline):
        raise _unknown(records, baseline)
    is_of_mtn = list(wanted) == ["mtn.enabled"]  # the other settings of MTN differ with it
    return [
        Place(
            _block(record, wanted),
            not found,
            (label.variant or BASELINE) if is_of_mtn else label.arm,
        )
        for record, found, label in zip(records, is_baseline, labels, strict=True)
    ]


def _compared_with_first(records: Sequence[RunRecord], labels: Sequence[Labels]) -> list[Place]:
    blocks = [_hash(_data_and_noise(record)) for record in records]
    first: dict[str, str] = {}
    for block, label in sorted(
        zip(blocks, labels, strict=True), key=lambda p: natural_order(p[1].arm)
    ):
        first.setdefault(block, label.arm)
    return [
        Place(block, label.arm != first[block], label.arm)
        for block, label in zip(blocks, labels, strict=True)
    ]


def _data_and_noise(record: RunRecord) -> dict[str, Any]:
    settings = record.identity.arm_settings
    return {k: v for k, v in settings.items() if k == "checksum" or k.startswith("noise.")}


def _value(record: RunRecord, key: str) -> Any:
    """Return the value of a dotted key, or the names of a group's choice; None if it is not set."""
    settings = record.identity.arm_settings
    if key == "data":
        return [record.data["name"]]
    target = settings.get(f"{key}._target_")
    return settings.get(key) if target is None else [part.lower() for part in target.split(".")]


def _is_same(value: Any, text: str) -> bool:
    """Return whether a value is the one written on the command line.

    >>> _is_same(0.001, "1e-3"), _is_same(False, "false"), _is_same(["esmm", "ESMM"], "esmm")
    (True, True, True)
    """
    if isinstance(value, list) and text.lower() in value:
        return True
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return value is not None and as_text(value) == text


def _block(record: RunRecord, keys: Collection[str]) -> str:
    """Return a hash of the settings other than the keys and those below them."""
    groups = {"mtn" if key == "mtn.enabled" else key for key in keys}
    groups |= {"checksum" for key in keys if key.startswith("data")}
    rest = {
        other: value
        for other, value in record.identity.arm_settings.items()
        if not any(other == group or other.startswith(f"{group}.") for group in groups)
    }
    return _hash(rest)


def _unknown(records: Sequence[RunRecord], baseline: str) -> InputError:
    found: dict[str, set[str]] = {}
    for record in records:
        for key, value in record.identity.arm_settings.items():
            found.setdefault(key, set()).add(as_text(value))
    varied = {key: values for key, values in found.items() if len(values) > 1 and key != "checksum"}
    choices = [f"{key}={value}" for key, values in varied.items() for value in sorted(values)]
    return InputError(
        f"baseline must be settings of some runs, for example model=esmm, got {baseline}. Choose "
        f"from those that differ: {format_names(choices) or 'none does'}."
    )


def natural_order(text: str) -> list[Any]:
    """Return a sort key of a text that orders its numbers by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
