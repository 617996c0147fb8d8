"""Errors that the user can fix."""

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

from mtnrec.checks import InputError


def find_input_error(error: BaseException) -> InputError | None:
    """Return the input error behind an error, if there is one.

    Hydra wraps input errors. Errors of Hydra, Lightning or torch about a config value count too.
    """
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, InputError):
        error = error.__cause__
    if isinstance(error, InstantiationException | OmegaConfBaseException):
        return InputError(" ".join(str(error).split()))
    return error if isinstance(error, InputError) else None
