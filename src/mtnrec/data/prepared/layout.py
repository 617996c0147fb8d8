"""Names of a prepared data set's splits, names and dtypes of its arrays."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from mtnrec.schema import Schema

DTYPES: dict[str, np.dtype[Any]] = {
    "categorical": np.dtype(np.int32),
    "numerical": np.dtype(np.float32),
    "labels": np.dtype(np.uint8),
    "group": np.dtype(np.int64),
    "probabilities": np.dtype(np.float64),
    "bag": np.dtype(np.int32),
}
BAG_DTYPES: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype(np.int64),
    "tokens": np.dtype(np.int32),
    "weights": np.dtype(np.float32),
}
_REQUIRED = ("categorical", "numerical", "labels")
_MORE_TESTS = re.compile(r"test_[a-z0-9_]+")


def test_splits(splits: Iterable[str]) -> list[str]:
    """Return the test sets among splits: ``test``, then those called ``test_*`` by name.

    >>> test_splits(["train", "test_random", "test"])
    ['test', 'test_random']
    """
    return sorted(split for split in splits if split == "test" or _MORE_TESTS.fullmatch(split))


def required_arrays(schema: Schema) -> list[str]:
    """Return the stems of the arrays required in each split."""
    bags = [bag_stem(field.name, part) for field in schema.multivalued for part in BAG_DTYPES]
    return [*_REQUIRED, *(["bag"] if bags else []), *bags]


def bag_stem(field: str, part: str) -> str:
    """Return the stem of a multi-valued field's array; ``part`` is a key of ``BAG_DTYPES``.

    >>> bag_stem("210", "tokens")
    'bags/210/tokens'
    """
    return f"bags/{field}/{part}"


def array_dtype(stem: str) -> np.dtype[Any]:
    """Return the dtype of ``<split>/<stem>.npy``."""
    return BAG_DTYPES[stem.rpartition("/")[2]] if stem.startswith("bags/") else DTYPES[stem]
