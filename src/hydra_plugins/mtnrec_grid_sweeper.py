"""Sweeper of mtnrec, in the only package where Hydra looks for plugins."""

import sys
from collections.abc import Mapping, Sequence
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
        self.task_function: TaskFunction = task_function
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Sweep, or sweep over each of several experiments."""
        from mtnrec.sweep import launch  # here, since every command loads this module

        loader = self.hydra_context.config_loader
        sweeps = launch.split_experiments(self.config, loader, arguments)
        if len(sweeps) > 1:
            self._sweep_each(sweeps)
        else:
            self.run(arguments)

    def run(self, arguments: list[str]) -> None:
        """Run the grids of one experiment."""
        from mtnrec.sweep import launch

        loader = self.hydra_context.config_loader
        grids = [{**self.params, **grid} for grid in self.grids.values()] or [dict(self.params)]
        jobs = launch.plan(self.config, loader, grids, arguments)
        launch.run_jobs(jobs, self.launcher, self.config)

    def _sweep_each(self, sweeps: Sequence[tuple[DictConfig, list[str]]]) -> None:
        """Run sweeps one after the other, and exit with the messages of those that failed."""
        failures = []
        for config, arguments in sweeps:
            sweeper = Plugins.instance().instantiate_sweeper(
                hydra_context=self.hydra_context, task_function=self.task_function, config=config
            )
            try:
                sweeper.sweep(arguments)
            except SystemExit as error:
                if not isinstance(error.code, str):  # a signal ended it
                    raise
                failures.append(error.code)
        if failures:
            sys.exit("\n".join(failures))
