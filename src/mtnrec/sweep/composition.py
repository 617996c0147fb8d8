"""Composition of the configs of a sweep's runs."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from mtnrec.command.config import Train, override_key
from mtnrec.command.errors import unknown_key

_logger = logging.getLogger(__name__)


class Composer:
    """Composes runs without the keys that their choices lack, and reports those keys.

    Hydra reads and merges all files for each run. Here runs with the same choices share that work:
    their other overrides are applied to copies, as Hydra applies them to what it has merged.

    Args:
        config: Config of the sweep.
        loader: Composes the configs of the runs.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self._config = config
        self._loader = loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._groups = {str(group) for group in config.hydra.runtime.choices}
        self._merged: dict[tuple[str, ...], DictConfig] = {}  # by the overrides of groups
        self._runs = 0
        self._used: set[str] = set()
        self._lacking: dict[str, Counter[str]] = {}  # runs by choice, by key
        self._errors: dict[str, HydraException] = {}

    def compose(self, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
        """Return the config of a run and the overrides that fit it."""
        kept, lacking = list(overrides), list[str]()
        while True:
            try:
                composed = self._compose(kept)
            except HydraException as error:
                key = unknown_key(error) or ""
                others = [line for line in kept if override_key(line) != key]
                if "." not in key or len(others) == len(kept):
                    raise
                kept = others
                lacking.append(key)
                self._errors[key] = error
            else:
                self._count(composed, kept, lacking)
                return composed, kept

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        parsed = self._parser.parse_overrides(list(overrides))
        values = [override for override in parsed if self._is_value(str(override.input_line))]
        others = tuple(line for line in overrides if not self._is_value(line))
        if others not in self._merged:
            self._merged[others] = self._loader.load_sweep_config(self._config, list(others))
        composed = copy.deepcopy(self._merged[others])
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        of_task = [override for override in parsed if not override.is_hydra_override()]
        composed.hydra.overrides.task = [override.input_line for override in of_task]
        job = composed.hydra.job
        job.override_dirname = get_overrides_dirname(of_task, **job.config.override_dirname)
        return composed

    def _is_value(self, override: str) -> bool:
        """Return whether an override certainly chooses no file and is not one of Hydra's keys."""
        key = override_key(override)
        if key.startswith("hydra") or "@" in override.partition("=")[0]:
            return False
        return "." in key or (key in Train.__annotations__ and key not in self._groups)

    def _count(self, composed: DictConfig, kept: Sequence[str], lacking: Sequence[str]) -> None:
        for key in lacking:
            group = key.partition(".")[0]
            choice = f"{group}={composed.hydra.runtime.choices.get(group)}"
            self._lacking.setdefault(key, Counter())[choice] += 1
        self._used |= {override_key(line) for line in kept}
        self._runs += 1

    def report(self) -> None:
        """Warn of keys that do not fit some runs, and refuse those that fit none."""
        for key, choices in self._lacking.items():
            if key not in self._used:
                raise self._errors[key]
            _logger.warning(
                "%s does not fit %s: %d of %d runs are made without it",
                key,
                ", ".join(choices),
                choices.total(),
                self._runs,
            )
