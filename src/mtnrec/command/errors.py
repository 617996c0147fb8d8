"""Errors that the user can put right."""

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

from mtnrec.checks import InputError


def find_input_error(error: BaseException) -> InputError | None:
    """Return what the user got wrong, if an error is of that kind.

    Hydra wraps it. What it, Lightning or torch say of a value of the config is of that kind too.
    """
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, InputError):
        error = error.__cause__
    if isinstance(error, InstantiationException | OmegaConfBaseException):
        return InputError(" ".join(str(error).split()))
    return error if isinstance(error, InputError) else None
