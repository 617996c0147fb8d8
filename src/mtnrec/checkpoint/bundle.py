"""Model metadata of a checkpoint, and the network rebuilt from it."""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn

from mtnrec.checkpoint.io import read_checkpoint
from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.model.network import build_network
from mtnrec.schema import Schema

FORMAT_VERSION = 1
METADATA_KEY = "mtnrec"  # key in the checkpoint
_PREFIX = "network."  # prefix of the network's weights in the module's `state_dict`


def model_metadata(
    network: Mapping[str, Any], manifest: Manifest, directory: Path
) -> dict[str, Any]:
    """Return the metadata with which a checkpoint can score raw values.

    Args:
        network: Model config: ``_target_`` and the keywords of its constructor.
        manifest: Manifest of the prepared training data.
        directory: Folder of that data, whose vocabulary files are included.
    """
    fields = (*manifest.schema.categorical, *manifest.schema.multivalued)
    files = {field.name: directory / "vocabulary" / f"{field.name}.parquet" for field in fields}
    return {
        "format_version": FORMAT_VERSION,
        "network": dict(network),
        "manifest": manifest.to_json(),
        "vocabularies": {
            name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for name, file in files.items()
            if file.is_file()
        },
    }


def read_model(path: Path) -> dict[str, Any]:
    """Read a checkpoint with model metadata, without running any code in it.

    Raises:
        InputError: If it is missing, damaged, or not a training checkpoint of mtnrec.
    """
    if not path.is_file():
        raise InputError(f"checkpoint: {path} is missing. Choose another file, or train again.")
    content = read_checkpoint(path, "Choose another file, or train again.", keys=("state_dict",))
    metadata = content.get(METADATA_KEY)
    if not isinstance(metadata, dict) or not metadata:
        raise InputError(
            f"{path} is not a checkpoint of mtnrec, or a version wrote it that did not yet keep "
            "the data's schema. Train again."
        )
    version = metadata.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(
            f"{path} must have format version {FORMAT_VERSION} for this version of mtnrec, got "
            f"{str(version)[:20]}. Train again."
        )
    files: Any = metadata.get("vocabularies")
    if not (
        isinstance(metadata.get("manifest"), str)
        and _has_text_keys(metadata.get("network"))
        and _has_text_keys(files)
        and all(isinstance(f, Tensor) and f.dtype == torch.uint8 for f in files.values())
    ):
        raise InputError(f"{path} is damaged: its model metadata is incomplete. Train again.")
    return content


def _has_text_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def read_manifest(content: Mapping[str, Any], path: Path) -> Manifest:
    """Return the manifest of the data set that a checkpoint was trained on."""
    return Manifest.from_json(content[METADATA_KEY]["manifest"].encode(errors="replace"), path)


def vocabulary_files(content: Mapping[str, Any]) -> dict[str, io.BytesIO]:
    """Return the vocabulary files by field."""
    files = content[METADATA_KEY]["vocabularies"]
    return {name: io.BytesIO(file.numpy().tobytes()) for name, file in files.items()}


def rebuild_network(content: Mapping[str, Any], schema: Schema, path: Path) -> nn.Module:
    """Rebuild the network of a checkpoint on the CPU, in float32 and evaluation mode.

    Raises:
        InputError: If its class cannot be imported or is not a network, or its weights do not fit
            the network or the memory.
    """
    keys = dict(content[METADATA_KEY]["network"])
    target = keys.pop("_target_", None)
    try:
        made_by = get_class(str(target))
    except Exception as error:  # Hydra raises several kinds
        raise InputError(
            f"{path} needs the model {target}, which cannot be imported here. Install its package."
        ) from error
    if not issubclass(made_by, nn.Module):
        raise InputError(
            f"the model of {path} must be a torch.nn.Module, got {target}. Train again."
        )
    try:
        network = build_network(partial(made_by, schema=schema, **keys))
    except Exception as error:  # the class may raise anything, e.g. on unknown keys
        raise InputError(f"{path}: {target} cannot be built from its config ({error})") from error
    weights = {
        name.removeprefix(_PREFIX): weight
        for name, weight in content["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: the weights do not fit {target}: {error}") from error
    return network.eval().requires_grad_(requires_grad=False)
