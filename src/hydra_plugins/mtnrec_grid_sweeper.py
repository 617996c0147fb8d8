"""The sweeper of mtnrec, here because Hydra takes plugins from this package alone."""

from collections.abc import Mapping
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Runs the cells of one or several grids; :mod:`mtnrec.sweep.launch` says how.

    Args:
        params: What is swept in every grid, as in Hydra's basic sweeper: ``seed: range(0,10)``.
        grids: By name, what each grid sweeps besides; without any there is one grid, of ``params``
            alone. What the command line says replaces a key in all of them.
    """

    def __init__(self, params: Mapping[str, Any], grids: Mapping[str, Mapping[str, Any]]) -> None:
        self.params = params
        self.grids = grids

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context: HydraContext = hydra_context
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from mtnrec.sweep import (
            launch as sweep,  # every command loads this module; only sweeps need that one
        )

        loader = self.hydra_context.config_loader
        grids = [{**self.params, **grid} for grid in self.grids.values()] or [dict(self.params)]
        jobs = sweep.plan(self.config, loader, grids, arguments)
        sweep.run(jobs, self.launcher, self.config)
