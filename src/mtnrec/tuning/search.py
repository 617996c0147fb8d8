"""Search of an arm's space by asking for trials and telling their losses (Optuna)."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from mtnrec.checks import InputError
from mtnrec.tuning.space import Range, Setting, Space

_RANDOM_TRIALS = 10  # Optuna's default


class Search:
    """Asks for the settings of an arm's trials and is told their losses.

    The first ten trials are random, each key's value drawn by the seed, the trial's number and the
    key: arms that search a key try the same values of it, whatever else they search, so that two
    arms do not differ by their luck. Optuna's tree-structured Parzen estimator asks the others,
    those that the losses so far favour. What it asks depends on the seed and on the losses told, in
    trial order, alone: told the same again, it asks the same again. So a search needs no state on
    disk, and the order in which the trials of a batch end does not matter.

    Args:
        space: Ranges and choices by key.
        trials: Number of trials.
        batch: Trials that are asked at a time, before any of them is told.
        seed: Seed of the sampler.

    Raises:
        InputError: If Optuna 4 is not installed.
    """

    def __init__(self, space: Space, *, trials: int, batch: int = 1, seed: int = 0) -> None:
        self._optuna = _import_optuna()
        self._knobs = space
        self._space = {key: self._distribution(knob) for key, knob in space.items()}
        self._trials, self._batch, self._seed = trials, batch, seed
        sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
        self._study = self._optuna.create_study(sampler=sampler, direction="minimize")
        self._open: list[Any] = []
        self.version = str(self._optuna.__version__)

    def ask(self) -> list[Setting]:
        """Return the settings of the next batch until it is told; none at the end."""
        if not self._open:
            left = self._trials - len(self._study.trials)
            self._open = [self._ask() for _ in range(min(self._batch, left))]
        return [dict(trial.params) for trial in self._open]

    def _ask(self) -> Any:
        number = len(self._study.trials)
        if number < _RANDOM_TRIALS:
            self._study.enqueue_trial(self._draw(number))
        return self._study.ask(self._space)

    def _draw(self, number: int) -> dict[str, Any]:
        """Return the setting of a random trial."""
        seeds = {key: [self._seed, number, *key.encode()] for key in self._knobs}
        draws = {key: np.random.default_rng(seed).random() for key, seed in seeds.items()}
        return {key: knob.at(draws[key]) for key, knob in self._knobs.items()}

    def tell(self, losses: Sequence[float | None]) -> None:
        """Tell the losses of the batch in the order asked; None for a trial that failed."""
        for trial, loss in zip(self._open, losses, strict=True):
            if loss is None:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, loss)
        self._open = []

    def importance(self) -> dict[str, float]:
        """Return each key's share of what sets the best tenth of the trials apart (PED-ANOVA).

        Watanabe et al., IJCAI 2023. Unlike fANOVA it needs no forest, so neither scikit-learn nor a
        seed. Empty if fewer than two trials have a loss, or all have the same.
        """
        done = self._study.get_trials(states=[self._optuna.trial.TrialState.COMPLETE])
        if len({trial.value for trial in done}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            evaluator = self._optuna.importance.PedAnovaImportanceEvaluator()
        found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {key: float(found[key]) for key in self._space if key in found}

    def _distribution(self, knob: Any) -> Any:
        distributions = self._optuna.distributions
        if isinstance(knob, Range):
            return distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
        return distributions.CategoricalDistribution(list(knob.values))


def _import_optuna() -> Any:
    """Import Optuna without its messages about each study and trial."""
    try:
        optuna: Any = import_module("optuna")
    except ImportError:
        found = "none"
    else:
        found = optuna.__version__
        if int(found.partition(".")[0]) >= 4:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            return optuna
    raise InputError(
        f"a tuned sweep must have Optuna 4, got {found}. Install it: pip install 'mtnrec[search]'."
    )
