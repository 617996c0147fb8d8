"""The job that this process runs: its overrides, its command line, its screen."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only


def is_sweep_job() -> bool:
    """Say whether Hydra's multirun started this run."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def owns_screen() -> bool:
    """Say whether this process is the only one that draws on the screen."""
    alone = not is_sweep_job() or draws_on_screen(HydraConfig.get().launcher._target_)
    return alone and is_rank_zero()


def is_rank_zero() -> bool:
    """Say whether this process is the one that writes and speaks, of those that share a run."""
    # Lightning sets the rank when it is imported; a command that does without it has one process.
    return getattr(rank_zero_only, "rank", 0) == 0


def draws_on_screen(launcher: str) -> bool:
    """Say whether a launcher's runs draw on the screen, one after the other."""
    return launcher.endswith(".BasicLauncher")


def job_overrides() -> list[str]:
    """Return what the job's config overrides, of the keys that are not Hydra's own."""
    return list(HydraConfig.get().overrides.task)


def job_command(output_dir: Path) -> list[str]:
    """Return the command that makes this run, by itself and in the same folder."""
    return train_command(output_dir, job_overrides())


def train_command(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command that makes a run of these overrides, by itself and in its folder."""
    place = ["hydra.mode=RUN", f"hydra.run.dir={folder}"]
    return ["python", "-m", "mtnrec.train", *place, *overrides]
