"""Job of this process: overrides, command line and screen."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import read_write

from mtnrec.command.config import CONF_DIR, override_key
from mtnrec.run.override import escape_interpolations, escape_quoted, quote_value

_LISTS_CALLBACKS = re.compile(r"\+{0,2}callbacks=\s*\[\s*\{")
# Hydra's keys about the sweep; the command of one run has none of them.
_OF_SWEEP = (
    *("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.launcher"),
    *("hydra/launcher", "hydra/sweeper"),
)


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


def make_datamodule(data: Any, overrides: Sequence[str]) -> Any:
    """Instantiate the data set of a config, and tell it which settings were given.

    Args:
        data: Config of the group ``data``.
        overrides: Overrides of the command line.
    """
    datamodule = instantiate(data, _convert_="all")
    keys = [override_key(line) for line in overrides]
    datamodule.given |= {key.removeprefix("data.") for key in keys if key.startswith("data.")}
    return datamodule


def job_command(output_dir: Path) -> list[str]:
    """Return the command that repeats this run alone, in the same folder."""
    return train_command(output_dir, job_overrides(), HydraConfig.get())


def quote_for_ranks(output_dir: Path) -> None:
    """Prepare Hydra's config for Lightning, which starts the other ranks with ``hydra.run.dir``.

    Lightning puts it between double quotes and escapes nothing.
    """
    hydra: Any = HydraConfig.get()
    with read_write(hydra):
        hydra.run.dir = escape_interpolations(escape_quoted(str(output_dir.absolute())))


def name_callbacks(argument: str) -> str:
    """Name the callbacks of ``callbacks=[{…},{…}]``, which Hydra would read as names of files.

    >>> name_callbacks("+callbacks=[{_target_:my.A},{_target_:my.B,rate:0.1}]")
    'callbacks={callback_0:{_target_:my.A},callback_1:{_target_:my.B,rate:0.1}}'
    >>> name_callbacks("callbacks=[learning_rate]")
    'callbacks=[learning_rate]'
    """
    if not _LISTS_CALLBACKS.match(argument):
        return argument
    try:
        items = OverridesParser.create().parse_override(argument)._value
    except HydraException:  # Hydra will report it
        return argument
    named = {f"callback_{number}": item for number, item in enumerate(cast(list[Any], items))}
    return f"callbacks={Override._get_value_element_as_str(cast(Any, named))}"


def name_sweeper_keys(argument: str) -> str:
    """Return ``trials=``, ``seeds=`` and ``only=`` as keys of the sweeper, which Hydra would sweep.

    >>> name_sweeper_keys("trials=8"), name_sweeper_keys("seeds=range(1,4)")
    ('hydra.sweeper.trials=8', 'hydra.sweeper.seeds="range(1,4)"')
    >>> name_sweeper_keys("only=mmoe,esmm"), name_sweeper_keys("seed=0")
    ('hydra.sweeper.only="mmoe,esmm"', 'seed=0')
    """
    key, _, value = argument.partition("=")
    if key not in ("trials", "seeds", "only"):
        return argument
    is_plain = value.isdigit() or value[:1] in ("[", '"', "'")
    return f"hydra.sweeper.{key}={value if is_plain else quote_value(value)}"


def train_command(folder: Path, overrides: Sequence[str], hydra: Any) -> list[str]:
    """Return the command of one run with these overrides, in its folder.

    Args:
        folder: Folder of the run.
        overrides: Overrides of the config, in Hydra's grammar.
        hydra: Hydra's config, for its options and overrides that a run depends on.
    """
    kept = [line for line in hydra.overrides.hydra if not line.lstrip("+~").startswith(_OF_SWEEP)]
    place = ["hydra.mode=RUN", f"hydra.run.dir={quote_value(str(folder))}"]
    return ["python", "-m", "mtnrec.train", *_options(hydra), *place, *kept, *overrides]


def _options(hydra: Any) -> list[str]:
    """Return the command-line options that say where the config files lie."""
    options = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            options += ["--config-dir", source.path]
        elif source.provider == "main" and Path(source.path) != CONF_DIR:
            options += ["--config-path", source.path]
    if hydra.job.config_name != "train":
        options += ["--config-name", hydra.job.config_name]
    return options
