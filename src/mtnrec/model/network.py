"""Interface of every model, and construction of one that fits in memory."""

from collections.abc import Callable
from itertools import chain
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError
from mtnrec.system.resources import memory_bytes

_TABLES = (nn.Embedding, nn.EmbeddingBag)


@runtime_checkable
class Network(Protocol):
    """Interface for training, MTN and export; a model is an ``nn.Module`` with these methods.

    It is built from the schema and the keys of its YAML file. Some attributes are optional:

    ``supports_cuda_graphs``
        Whether each batch launches the same kernels; see :mod:`mtnrec.training.cuda_graph`.
    ``expert_outputs``
        An ``nn.Identity`` that the outputs ``(B, E, O)`` of the experts pass through; see
        :mod:`mtnrec.training.expert_distances`.
    ``losses(batch)``
        Scalars by name in place of the labels' cross entropies, those of the labels among them,
        under the labels' names. ``loss_weights`` has their weights in the objective by name, in the
        same order.
    ``measured``
        Scalars of the last ``losses`` by name, without a gradient; their mean over an epoch's rows
        is logged as ``train/name``.
    """

    def __call__(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        ...

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        ...

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return the parallel layers at each depth below the towers; empty without any."""
        ...


def require_network(module: object) -> None:
    """Check that a module is a network.

    Raises:
        InputError: If a method is missing.
    """
    if not isinstance(module, Network):
        methods = ("task_layers", "shared_layers")
        missing = [f"{name}()" for name in methods if not hasattr(module, name)]
        raise InputError(
            f"a model must have task_layers() and shared_layers(), got {type(module).__name__} "
            f"without {' and '.join(missing)}. Add them: they return lists of the model's linear "
            "layers by depth, or []."
        )


def split_parameters(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters: ``embeddings``, those of tables, and ``network``, the rest."""
    tables = [part for part in network.modules() if isinstance(part, _TABLES)]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}
    found: dict[str, list[nn.Parameter]] = {"embeddings": [], "network": []}
    for parameter in network.parameters():
        found["embeddings" if id(parameter) in embeddings else "network"].append(parameter)
    return found


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters, by the parts of :func:`split_parameters`."""
    parts = split_parameters(network)
    return {name: sum(parameter.numel() for parameter in part) for name, part in parts.items()}


def build_network(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network after checking on the meta device that its weights fit in memory.

    Training takes three to four times the memory of the weights.

    Args:
        build: Calls the constructor.

    Raises:
        InputError: If the weights alone exceed the memory, or a keyword is unknown or missing.
    """
    remedy = "Choose smaller widths, or data with smaller vocabularies."
    try:
        with torch.device("meta"):
            sketch = build()
    except (RuntimeError, TypeError) as error:
        if "overflow" in str(error).lower():
            raise InputError(
                f"the weights must fit in memory, got too many to count. {remedy}"
            ) from error
        if "keyword argument" in str(error) or "keyword-only argument" in str(error):
            raise InputError(f"model: {error}") from error
        raise
    weights = chain(sketch.parameters(), sketch.buffers())
    needed, memory = sum(w.numel() * w.element_size() for w in weights), memory_bytes()
    if needed > memory:
        raise InputError(
            f"the weights must fit in memory ({memory:,} bytes), got {needed:,} bytes. {remedy}"
        )
    return build()
