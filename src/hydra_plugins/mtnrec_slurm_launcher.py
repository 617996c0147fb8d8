"""Slurm launcher that need not wait, in the only package where Hydra looks for plugins."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

with suppress(ImportError):  # without the extra `slurm`
    from hydra_plugins.hydra_submitit_launcher import (  # type: ignore[import-untyped]
        submitit_launcher,
    )
    from hydra_plugins.hydra_submitit_launcher.config import (  # type: ignore[import-untyped]
        SlurmQueueConf,
    )

    @dataclass
    class SlurmSettings(SlurmQueueConf):  # type: ignore[misc]
        """Keys of ``conf/hydra/launcher/slurm.yaml``: those of the plugin, and ``wait``."""

        _target_: str = f"{__name__}.MtnrecSlurmLauncher"
        wait: bool = True

    ConfigStore.instance().store(
        group="hydra/launcher", name="submitit_slurm_schema", node=SlurmSettings()
    )

    class MtnrecSlurmLauncher(submitit_launcher.SlurmLauncher):  # type: ignore[misc]
        """Submits the runs as a job array.

        Args:
            wait: Whether to wait for the results.
            settings: Settings of Hydra's plugin.
        """

        def __init__(self, wait: bool = True, **settings: Any) -> None:
            super().__init__(**settings)
            self.wait = wait

        def setup(
            self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
        ) -> None:
            sweeper = config.hydra.sweeper._target_
            if not self.wait and not sweeper.endswith(".GridSweeper"):
                raise SystemExit(
                    "mtnrec: hydra.launcher.wait must be true in a search, which needs the results "
                    f"({sweeper}), got false. Leave it out."
                )
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

        def launch(
            self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> Sequence[JobReturn]:
            """Launch the runs.

            Returns:
                The results or, without waiting, the ID of each job as ``task_name``.
            """
            if self.wait:
                return super().launch(job_overrides, initial_job_idx)
            import submitit  # here, since every command loads this module

            # The plugin has no setting for it: it always asks its jobs for their results.
            with patch.object(
                submitit.Job, "results", lambda job: [JobReturn(task_name=job.job_id)]
            ):
                return super().launch(job_overrides, initial_job_idx)
