"""Job of this process: overrides, command line and screen."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only


def is_sweep_job() -> bool:
    """Return whether Hydra's multirun started this run."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def owns_screen() -> bool:
    """Return whether this process is the only one that draws on the screen."""
    alone = not is_sweep_job() or draws_on_screen(HydraConfig.get().launcher._target_)
    return alone and is_rank_zero()


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of its run."""
    # Lightning sets the rank on import; a command that does not import it has one process.
    return getattr(rank_zero_only, "rank", 0) == 0


def draws_on_screen(launcher: str) -> bool:
    """Return whether the runs of a launcher draw on the screen, one after the other."""
    return launcher.endswith(".BasicLauncher")


def job_overrides() -> list[str]:
    """Return the config overrides of the job, without those of Hydra's keys."""
    return list(HydraConfig.get().overrides.task)


def job_command(output_dir: Path) -> list[str]:
    """Return the command that repeats this run alone, in the same folder."""
    return train_command(output_dir, job_overrides())


def train_command(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command of one run with these overrides, in its folder."""
    place = ["hydra.mode=RUN", f"hydra.run.dir={folder}"]
    return ["python", "-m", "mtnrec.train", *place, *overrides]
