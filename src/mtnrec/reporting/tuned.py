"""Tuned sweeps below a folder: which runs are trials, and which arm a fresh run belongs to."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from mtnrec.checks import InputError, format_names
from mtnrec.reporting.baseline import Place
from mtnrec.run.identity import TREATMENTS
from mtnrec.tuning.record import TUNING_FILE, TunedArm, Tuning

_ARM_IS = "arm="  # baseline=arm=NAME


@dataclass(frozen=True)
class TunedSweeps:
    """Tuned sweeps.

    Args:
        by_folder: Records of the sweeps, by the folder of each.
    """

    by_folder: Mapping[Path, Tuning]

    @cached_property
    def arms(self) -> list[tuple[Path, TunedArm]]:
        """Searches, each with the folder of its sweep."""
        return [(folder, arm) for folder, found in self.by_folder.items() for arm in found.arms]

    @cached_property
    def fresh(self) -> dict[Path, TunedArm]:
        """Arm of each fresh run, by the folder of the run."""
        return {folder / name: arm for folder, arm in self.arms for name in arm.fresh.values()}

    @cached_property
    def superseded(self) -> set[Path]:
        """Folders of tested runs whose setting a later search replaced."""
        return {folder / name for folder, t in self.by_folder.items() for name in t.superseded}

    @cached_property
    def keys(self) -> set[str]:
        """Keys and groups that an arm or a search sets."""
        searched = {key for _, arm in self.arms for key in arm.space}
        fixed = {line.partition("=")[0].lstrip("+~") for _, arm in self.arms for line in arm.fixed}
        return {*TREATMENTS, *searched, *fixed}

    def sets(self, key: str) -> bool:
        """Return whether an arm or a search sets a dotted key."""
        return any(key == own or key.startswith(f"{own}.") for own in self.keys)


def read_tuned(root: Path) -> TunedSweeps:
    """Return the tuned sweeps below a folder.

    Raises:
        InputError: If a ``tuning.json`` is not one.
    """
    paths = sorted(root.rglob(TUNING_FILE))
    return TunedSweeps({path.parent: Tuning.read(path) for path in paths})


def place_tuned(arms: Sequence[TunedArm], baseline: str | None) -> list[Place]:
    """Return the place of fresh runs: an arm is compared with those of its place and budget.

    Args:
        arms: Arm of each run.
        baseline: ``arm=NAME`` of the baseline; otherwise it is the sweep's first arm.

    Raises:
        InputError: If no arm has the name.
    """
    names = sorted({arm.arm for arm in arms})
    wanted = baseline_arm(baseline)
    if wanted is not None and wanted not in names:
        raise InputError(
            f"baseline must name an arm of the tuned sweep, got {baseline}. Choose from "
            f"{format_names([f'{_ARM_IS}{name}' for name in names])}."
        )
    return [
        Place(
            _block(arm), not (arm.is_baseline if wanted is None else arm.arm == wanted), arm.title
        )
        for arm in arms
    ]


def baseline_arm(baseline: str | None) -> str | None:
    """Return the name of a tuned arm that ``baseline=arm=NAME`` chooses; None for other keys."""
    is_arm = baseline is not None and baseline.startswith(_ARM_IS)
    return baseline.removeprefix(_ARM_IS) if is_arm and baseline is not None else None


def selection_optimism(arm: TunedArm, fresh: Collection[float]) -> float | None:
    """Return by how much the best trial's value is better than the mean of the fresh runs.

    The best of many noisy values is better than what its setting gives again. Positive is
    optimistic, whatever the better direction; None without a best trial or a fresh value.
    """
    if arm.best is None or arm.best.value is None or not fresh:
        return None
    difference = arm.best.value - fmean(fresh)
    return -difference if arm.better == "lower" else difference


def _block(arm: TunedArm) -> str:
    content = [arm.place, arm.monitor, asdict(arm.budget)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
