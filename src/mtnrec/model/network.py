"""Making a network, if the memory holds it."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from mtnrec.checks import InputError
from mtnrec.resources import memory_bytes


def make_network(make: Callable[[], nn.Module]) -> nn.Module:
    """Call ``make``, at first without memory; a training takes three to four times the weights.

    Raises:
        InputError: If the weights alone exceed the memory, or the keywords are not the network's.
    """
    remedy = "choose smaller widths, or data with smaller vocabularies"
    try:
        with torch.device("meta"):
            sketch = make()
    except (RuntimeError, TypeError) as error:
        if "overflow" in str(error).lower():
            raise InputError(f"the weights are more than any memory holds: {remedy}") from error
        if "keyword argument" in str(error) or "keyword-only argument" in str(error):
            raise InputError(f"model: {error}") from error
        raise
    weights = chain(sketch.parameters(), sketch.buffers())
    needed, memory = sum(w.numel() * w.element_size() for w in weights), memory_bytes()
    if needed > memory:
        raise InputError(
            f"the weights take {needed:,} bytes and the memory is {memory:,} bytes: {remedy}"
        )
    return make()
