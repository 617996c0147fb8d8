"""Model metadata of a checkpoint, and the network rebuilt from it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mtnrec.checkpoint.io import check_weights, read_checkpoint
from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.model.network import build_network
from mtnrec.schema import Schema

FORMAT_VERSION = 1
METADATA_KEY = "mtnrec"  # key in the checkpoint
_PREFIX = "network."  # prefix of the network's weights in the module's `state_dict`
_OWN_NETWORKS = "mtnrec.model"
_SPARE_PARAMETERS = 1000  # that a constructor may register and then replace


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
        InputError: If it is damaged or not a training checkpoint of mtnrec.
    """
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


def rebuild_network(
    content: Mapping[str, Any], schema: Schema, path: Path, allow: Sequence[str] = ()
) -> nn.Module:
    """Rebuild the network of a checkpoint on the CPU, in float32 and evaluation mode.

    Args:
        content: Content of the checkpoint.
        schema: Schema of the data set that it was trained on.
        path: File of the checkpoint, for messages.
        allow: Modules and packages, in addition to mtnrec's networks, whose classes the file may
            name; a class is imported, which runs the code of its module.

    Raises:
        InputError: If its class is not allowed, cannot be imported or is not a network, or its
            weights do not fit the network or the memory.
    """
    keys = dict(content[METADATA_KEY]["network"])
    target = str(keys.pop("_target_", None))
    made_by = _import_network(target, path, [_OWN_NETWORKS, *allow])
    weights = {
        name.removeprefix(_PREFIX): weight
        for name, weight in content["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    with _explained(path, target):
        build = partial(made_by, schema=schema, **keys)
        with torch.device("meta"), _registering_at_most(2 * len(weights) + _SPARE_PARAMETERS):
            sketch = build()
    check_weights(path, weights, sketch.state_dict(), "Train again.")
    with _explained(path, target):
        network = build_network(build)
        network.load_state_dict(weights)
    return network.eval().requires_grad_(requires_grad=False)


@contextmanager
def _explained(path: Path, target: str) -> Iterator[None]:
    """Turn an error of a network's class, which may raise any, into one that names the file."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{path}: {target} cannot be built from its config and weights ({str(error)[:200]}). "
            "Train again."
        ) from error


def _import_network(target: str, path: Path, allowed: Sequence[str]) -> type[nn.Module]:
    module, _, name = target.rpartition(".")
    if not any(f"{module}.".startswith(f"{known}.") for known in allowed):
        raise InputError(
            f"{path} must name a model of mtnrec or of an allowed module, got {target[:200]}, "
            "whose code would run. If you trust that code, set "
            f"allow=[{module[:200]}]."
        )
    try:
        made_by = getattr(import_module(module), name)
    except Exception as error:  # the module may raise anything
        raise InputError(
            f"{path} needs the model {target}, which cannot be imported here. Install its package."
        ) from error
    if not (isinstance(made_by, type) and issubclass(made_by, nn.Module)):
        raise InputError(
            f"the model of {path} must be a torch.nn.Module, got {target}. Train again."
        )
    return made_by


@contextmanager
def _registering_at_most(most: int) -> Iterator[None]:
    """Stop a constructor that registers more parameters, such as those of a million layers."""
    left = most

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("it has more layers than the checkpoint has weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
