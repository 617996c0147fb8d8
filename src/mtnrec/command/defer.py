"""Keys that the default choices of a sweep lack, but those of its runs may have."""

import sys

from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode

from mtnrec.command.config import CONF_DIR
from mtnrec.command.errors import unknown_key
from mtnrec.run.override import quote_value


def defer_keys(name: str) -> bool:
    """Leave such keys of the command line to the runs, if it starts a sweep.

    Before the configs of the runs Hydra composes one with the default choices. A key that is swept
    over one value is left out of it.

    Args:
        name: Name of the command.

    Returns:
        Whether the command line has changed.

    Raises:
        HydraException: If the command line has another fault.
    """
    given = get_args_parser().parse_args(sys.argv[1:])
    overrides = list(given.overrides)
    own = (
        [] if given.config_dir is None else [f"hydra.searchpath=[{quote_value(given.config_dir)}]"]
    )
    with initialize_config_dir(given.config_path or str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        while True:
            lines = [*overrides, *own]
            try:
                config = loader.load_configuration(
                    given.config_name or name, lines, RunMode.MULTIRUN
                )
            except HydraException as error:
                deferred = [_defer(override, unknown_key(error)) for override in overrides]
                if deferred == overrides:
                    raise
                overrides = deferred
            else:
                is_sweep = given.multirun or config.hydra.mode is RunMode.MULTIRUN
                return is_sweep and _replace(dict(zip(given.overrides, overrides, strict=True)))


def _replace(changes: dict[str, str]) -> bool:
    before = sys.argv[1:]
    sys.argv[1:] = [changes.get(argument, argument) for argument in before]
    return sys.argv[1:] != before


def _defer(override: str, key: str | None) -> str:
    name, _, value = override.partition("=")
    in_group = "." in name and not name.startswith("hydra.")
    return f"{name}=choice({value})" if name == key and in_group and value else override
