"""Atomic checkpoint files."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mtnrec.checkpoint.reader import read_archive, seal
from mtnrec.checks import InputError
from mtnrec.system.files import write_atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint to a temporary file, which then replaces the previous one atomically.

    Raises:
        InputError: If it cannot be written, for example on a full disk; the previous file stays.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        seal(content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getbuffer())
        except OSError as error:
            raise InputError(
                f"{path} could not be written ({error.strerror}; {len(content.getbuffer()):,} "
                "bytes). Delete other files, or choose another hydra.run.dir. The previous "
                "checkpoint stays, and the same command resumes from it."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU without running code in it, whatever the arguments."""
        return read_checkpoint(Path(path), "Choose another checkpoint.", keys=("state_dict",))


def read_checkpoint(
    path: Path, remedy: str, keys: Sequence[str] = ("state_dict", "callbacks")
) -> dict[str, Any]:
    """Read a training checkpoint.

    Args:
        path: The file.
        remedy: Last sentence of the error messages.
        keys: Required keys, ``state_dict`` among them.

    Raises:
        InputError: If it is damaged or not a checkpoint.
    """
    try:
        checkpoint = read_archive(path)
    # Bytes that torch did not write may raise any error.
    except Exception as error:
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"{path} is damaged or not a checkpoint ({reason}). {remedy}") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), dict) for key in keys
    ):
        raise InputError(f"{path} is not a training checkpoint. {remedy}")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise InputError(f"{path} is damaged: {name!r} is not a weight. {remedy}")
    return checkpoint


def check_format(path: Path, found: int | None, expected: int, remedy: str) -> None:
    """Refuse a training file in the format of another version of mtnrec.

    Args:
        path: The file.
        found: Its format; None if the version that wrote it had no formats.
        expected: Format of this version.
        remedy: Last sentence of the error message.
    """
    if found != expected:
        raise InputError(
            f"{path} must have format {expected}, got {found}: another version of mtnrec wrote "
            f"it, and can resume it. {remedy}"
        )


def check_weights(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], remedy: str
) -> None:
    """Refuse weights of another model or schema.

    Args:
        path: The file.
        found: Its ``state_dict``.
        expected: ``state_dict`` of the model.
        remedy: Last sentence of the error message.
    """
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (found, expected)]
        if shapes[0] != shapes[1]:
            there, here = ("absent" if shape is None else str(shape) for shape in shapes)
            raise InputError(
                f"{path} is of another model or schema: {name} is {there} there and {here} here. "
                f"{remedy}"
            )
