"""Sweeper of mtnrec, in the only package where Hydra looks for plugins."""

from collections.abc import Mapping
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Runs one or several grids; see :mod:`mtnrec.sweep.launch`.

    Args:
        params: Values swept in every grid, as in Hydra's basic sweeper: ``seed: range(0,10)``.
        grids: Additional values of each grid, by name; if empty, ``params`` is the only grid. The
            command line replaces a key in all grids.
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
            launch as sweep,  # here, since every command loads this module
        )

        loader = self.hydra_context.config_loader
        grids = [{**self.params, **grid} for grid in self.grids.values()] or [dict(self.params)]
        jobs = sweep.plan(self.config, loader, grids, arguments)
        sweep.run_jobs(jobs, self.launcher, self.config)
