"""Checkpoints that are there whole or not at all."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mtnrec.checks import InputError
from mtnrec.files import write_atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside the one that it replaces, and puts it in place at the end.

    Raises:
        InputError: If the disk is full, say; what was there stays.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getbuffer())
        except OSError as error:
            raise InputError(
                f"{path} could not be written ({error.strerror}; {len(content.getbuffer()):,} "
                "bytes): make room, or choose another hydra.run.dir. What was there stays, and the "
                "same command goes on from it"
            ) from error


def read_checkpoint(
    path: Path, remedy: str, keys: Sequence[str] = ("state_dict", "callbacks")
) -> dict[str, Any]:
    """Read a checkpoint of a training.

    Args:
        path: The file.
        remedy: What to do where it is none.
        keys: What it must have; ``state_dict`` is one of them.

    Raises:
        InputError: If it is damaged, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path.stat().st_size)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(checkpoint, path.stat().st_size)
    # A pickle may raise any error, on bytes that torch did not write.
    except Exception as error:
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"{path} is damaged or no checkpoint ({reason}): {remedy}") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), dict) for key in keys
    ):
        raise InputError(f"{path} is no checkpoint of a training: {remedy}")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise InputError(f"{path} is damaged: {name!r} is no weight: {remedy}")
    return checkpoint


def check_format(path: Path, found: int | None, expected: int, remedy: str) -> None:
    """Refuse what another version of mtnrec wrote of a training; None is of one without formats.

    Args:
        path: The file.
        found: Its format.
        expected: That of this version.
        remedy: What to do where they differ.
    """
    if found != expected:
        raise InputError(
            f"{path} must have format {expected}, got {found}: another version of mtnrec wrote it. "
            f"Go on with that one, or {remedy}"
        )


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what torch does not write: it packs without compression or overlap."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise zipfile.BadZipFile("its parts are compressed")
    if sum(info.file_size for info in infos) > size:
        raise zipfile.BadZipFile("its parts are larger than the file")
    if (part := archive.testzip()) is not None:  # torch compares no checksums
        raise zipfile.BadZipFile(f"the checksum of {part} differs")


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors whose numbers are not all there: repeated ones have any size for nothing.

    torch 2.7 believes what the pickle says of the size of a storage, so none is looked into.
    """
    waiting, seen, storages = [content], set(), dict[int, int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:  # a part may be in itself
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list | tuple | set):
            waiting += part
        elif isinstance(part, Tensor):
            if not _is_whole(part):
                raise ValueError(f"a tensor {tuple(part.shape)} is not whole")
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError("its tensors are larger than the file")


def _is_whole(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_weights(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], remedy: str
) -> None:
    """Refuse weights of another model, or of one that was made for another schema.

    Args:
        path: The file that they are from.
        found: Its ``state_dict``.
        expected: That of the model.
        remedy: What to do where they differ.
    """
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (found, expected)]
        if shapes[0] != shapes[1]:
            there, here = ("absent" if shape is None else str(shape) for shape in shapes)
            raise InputError(
                f"{path} is of another model or schema: {name} is {there} there and {here} here: "
                f"{remedy}"
            )
