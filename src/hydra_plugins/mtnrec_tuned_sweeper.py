"""Sweeper that tunes arms with equal budgets, in the only package where Hydra looks for plugins."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_plugins.mtnrec_grid_sweeper import GridSweeper


class TunedSweeper(GridSweeper):
    """Tunes each arm, then trains fresh seeds of its best setting; see :mod:`mtnrec.sweep.tune`.

    Args:
        params: Values of every arm, by key; ``a,b`` and ``range(…)`` sweep, ``choice(…)`` and
            ``interval(…)`` are searched.
        arms: Values of each arm, by name. The arm that comes first is the baseline.
        only: Names of the arms to tune, a list or ``a,b``; None for all.
        trials: Trials of each arm, the same for all.
        batch: Trials of an arm that are asked at a time.
        sampler_seed: Seed of the sampler, the same for every arm.
        trial_seed: Seed of the trials' runs.
        seeds: Seeds of the fresh runs.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        arms: Mapping[str, Mapping[str, Any]],
        only: str | Sequence[str] | None,
        trials: int,
        batch: int,
        sampler_seed: int,
        trial_seed: int,
        seeds: Any,
    ) -> None:
        super().__init__(params, arms)
        self.only = only
        self.seeds = seeds
        self.budget = {
            "trials": trials,
            "batch": batch,
            "sampler_seed": sampler_seed,
            "trial_seed": trial_seed,
        }

    def run(self, arguments: list[str]) -> None:
        """Tune the arms of one experiment."""
        from mtnrec.sweep import tune  # here, since every command loads this module

        loader = self.hydra_context.config_loader
        budget = tune.make_budget(self.budget)
        seeds = tune.parse_seeds(self.seeds, budget.trial_seed, loader)
        studies = tune.plan_studies(
            self.config, loader, self.params, self.grids, budget, arguments, self.only
        )
        tune.tune(studies, seeds, self.launcher, self.config)
