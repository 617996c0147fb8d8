"""Record of a tuned sweep, ``tuning.json``: the searches of its arms and what they chose."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mtnrec.checks import InputError
from mtnrec.system.files import read_json, write_json

TUNING_FILE = "tuning.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """A told trial.

    Args:
        folder: Folder of its run, relative to that of the sweep.
        setting: Values of the searched keys.
        value: Monitor at the best epoch; None if the trial failed.
    """

    folder: str
    setting: Mapping[str, float | str]
    value: float | None


@dataclass(frozen=True)
class Budget:
    """What a search may spend, and the seeds that determine it.

    Args:
        trials: Number of trials.
        batch: Trials that are asked at a time.
        sampler_seed: Seed of the sampler.
        trial_seed: Seed of each trial's run.
    """

    trials: int
    batch: int
    sampler_seed: int
    trial_seed: int


@dataclass(frozen=True)
class TunedArm:
    """Search of an arm in one place, and the fresh runs of its best setting.

    Args:
        arm: Name of the arm.
        is_baseline: Whether the other arms of its place are compared with it.
        place: Hash of the settings that all arms of a place share: data set, model, ….
        fixed: Overrides that are the arm's own.
        space: Ranges and choices of the searched keys, as on the command line.
        budget: What the search may spend.
        monitor: Metric that chose.
        better: Its better direction, ``higher`` or ``lower``.
        trials: Told trials, in order.
        importance: Share of each searched key in what sets the best trials apart.
        fresh: Folders of the fresh runs, by seed.
        optuna: Version that asked.
    """

    arm: str
    is_baseline: bool
    place: str
    fixed: Sequence[str]
    space: Mapping[str, str]
    budget: Budget
    monitor: str
    better: str = "higher"
    trials: Sequence[Trial] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    optuna: str = ""

    @property
    def title(self) -> str:
        """Name of the arm for readers."""
        return self.arm.replace("_", " ")

    @property
    def best(self) -> Trial | None:
        """Best trial, as :func:`best_trial`."""
        return best_trial(self.trials, self.better)


def best_trial(trials: Sequence[Trial], better: str) -> Trial | None:
    """Return the trial with the best value, the first of several; None if all failed.

    Args:
        trials: Trials in order.
        better: ``higher`` or ``lower``.
    """
    sign = 1 if better == "lower" else -1
    done = [(sign * trial.value, trial) for trial in trials if trial.value is not None]
    return min(done, key=lambda pair: pair[0])[1] if done else None


@dataclass(frozen=True)
class Tuning:
    """Content of ``tuning.json``.

    Args:
        arms: Searches of the sweep, newest last.
        superseded: Folders of tested runs whose setting a later search replaced.
    """

    arms: Sequence[TunedArm] = ()
    superseded: Sequence[str] = ()

    def replace(self, arms: Sequence[TunedArm]) -> "Tuning":
        """Return the content with these searches in place of those of the same arm and place."""
        new = {(arm.arm, arm.place) for arm in arms}
        kept = [arm for arm in self.arms if (arm.arm, arm.place) not in new]
        current = {folder for arm in (*kept, *arms) for folder in arm.fresh.values()}
        known = [folder for arm in self.arms for folder in arm.fresh.values()]
        old = {*self.superseded, *known} - current
        return Tuning((*kept, *arms), sorted(old))

    def write(self, folder: Path) -> None:
        """Write ``tuning.json`` atomically."""
        write_json(folder / TUNING_FILE, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "Tuning":
        """Read a ``tuning.json``; empty if it is missing.

        Raises:
            InputError: If it is not one.
        """
        content = read_json(path)
        if content is None:
            return cls()
        try:
            found = _SHAPE.validate_python(_versioned(content), strict=False)
        except (ValidationError, ValueError) as error:
            raise InputError(
                f"{path} is not the record of a tuned sweep ({str(error)[:200]}). Delete it and "
                "start the sweep again: its finished runs are kept."
            ) from None
        names = [trial.folder for arm in found.arms for trial in arm.trials]
        names += [name for arm in found.arms for name in arm.fresh.values()]
        if {"/", ".."} & {
            part for name in (*names, *found.superseded) for part in Path(name).parts
        }:
            raise InputError(f"{path} must name folders below its own. Delete it and run again.")
        return found


def _versioned(content: Mapping[str, Any]) -> dict[str, Any]:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}, not {FORMAT_VERSION}")
    return {key: value for key, value in content.items() if key != "format_version"}


_SHAPE = TypeAdapter(Tuning)
