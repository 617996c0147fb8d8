"""What a checkpoint says of its model, and the model that it makes again."""

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
METADATA_KEY = "mtnrec"  # the checkpoint's key
_PREFIX = "network."  # of the network's weights in those of the module


def model_metadata(
    network: Mapping[str, Any], manifest: Manifest, directory: Path
) -> dict[str, Any]:
    """Return what a checkpoint carries beside the weights, so that it can score raw values.

    Args:
        network: The config of the model: ``_target_`` and the keywords of its constructor.
        manifest: Of the prepared data set that it is trained on.
        directory: Its folder; the files of its vocabularies are taken over.
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
    """Return the content of a checkpoint with a metadata; no code in it is run.

    Raises:
        InputError: If it is missing, damaged, or none of a training by mtnrec.
    """
    if not path.is_file():
        raise InputError(f"checkpoint: {path} is missing")
    content = read_checkpoint(path, "name another file, or train again", keys=("state_dict",))
    metadata = content.get(METADATA_KEY)
    if not isinstance(metadata, dict) or not metadata:
        raise InputError(
            f"{path} is no checkpoint of mtnrec, or of a version that did not yet keep the data's "
            "schema in it: train again"
        )
    version = metadata.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {str(version)[:20]}, this version of mtnrec reads "
            f"{FORMAT_VERSION}: train again"
        )
    files: Any = metadata.get("vocabularies")
    if not (
        isinstance(metadata.get("manifest"), str)
        and _has_texts_as_keys(metadata.get("network"))
        and _has_texts_as_keys(files)
        and all(isinstance(f, Tensor) and f.dtype == torch.uint8 for f in files.values())
    ):
        raise InputError(f"{path} is damaged: what it says of its model is not whole; train again")
    return content


def _has_texts_as_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def read_manifest(content: Mapping[str, Any], path: Path) -> Manifest:
    """Return the manifest of the data set that a checkpoint's model was trained on."""
    return Manifest.from_json(content[METADATA_KEY]["manifest"].encode(errors="replace"), path)


def vocabulary_files(content: Mapping[str, Any]) -> dict[str, io.BytesIO]:
    """Return the files of the vocabularies, by field."""
    files = content[METADATA_KEY]["vocabularies"]
    return {name: io.BytesIO(file.numpy().tobytes()) for name, file in files.items()}


def rebuild_network(content: Mapping[str, Any], schema: Schema, path: Path) -> nn.Module:
    """Make the network of a checkpoint, on the CPU, in float32 and evaluation mode.

    Raises:
        InputError: If its class is unknown here or no network, or its weights do not fit, it or the
            memory.
    """
    keys = dict(content[METADATA_KEY]["network"])
    target = keys.pop("_target_", None)
    try:
        made_by = get_class(str(target))
    except Exception as error:  # Hydra raises several kinds
        raise InputError(
            f"{path} needs the model {target}, which cannot be imported here: install the package "
            "that has it"
        ) from error
    if not issubclass(made_by, nn.Module):
        raise InputError(f"{path} names {target} as its model, which is no torch.nn.Module")
    try:
        network = build_network(partial(made_by, schema=schema, **keys))
    except Exception as error:  # the class may raise any, of keys that are not its own
        raise InputError(f"{path}: {target} cannot be made as it says ({error})") from error
    weights = {
        name.removeprefix(_PREFIX): weight
        for name, weight in content["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: the weights are not those of {target}: {error}") from error
    return network.eval().requires_grad_(requires_grad=False)
