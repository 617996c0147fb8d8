"""The manifest of a prepared data set: the content of its `schema.json`."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtnrec.checks import InputError
from mtnrec.data.prepared.layout import BAG_DTYPES, DTYPES, bag_stem, test_splits
from mtnrec.schema import CategoricalField, Schema

FORMAT_VERSION = 2
LARGEST_NUMBER = float(np.finfo(np.float32).max)  # in a numerical feature
SCHEMA_FILE = "schema.json"
_LONGEST_SCHEMA = 1 << 24  # bytes
_CHECKSUM = "checksum"  # key of `schema.json`: SHA-256 of the others

_logger = logging.getLogger(__name__)


class NotPreparedError(InputError):
    """A folder holds no prepared data set."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``schema.json``.

    Args:
        source: Name of the data set, for example ``aliexpress_nl``.
        parameters: Settings of the preparation; equal settings give equal bytes.
        schema: Fields and labels.
        rows: Number of rows per split.
        positives: Number of rows with label 1, per split and label.
        missing: Number of rows without a value, per split and feature that lacks some.
        transforms: Transform per numerical feature: a missing value became ``fill``, then
            ``(value - shift) / scale`` was stored; features stored unchanged have no entry.
        report: Counts of the preparation, for example of dropped rows.
        checksums: SHA-256 per file, by its path in the folder.
    """

    source: str
    parameters: dict[str, Any]
    schema: Schema
    rows: dict[str, int]
    positives: dict[str, dict[str, int]]
    missing: dict[str, dict[str, int]]
    transforms: dict[str, dict[str, float]]
    report: dict[str, int]
    checksums: dict[str, str]

    def to_json(self) -> str:
        """Serialise to JSON; equal manifests give equal text."""
        return _to_text({"format_version": FORMAT_VERSION, **asdict(self)})

    def to_file(self) -> str:
        """Return the text of ``schema.json``: the manifest and its checksum."""
        content = json.loads(self.to_json())  # keys are texts, as they will be read
        return _to_text(content | {_CHECKSUM: _sha256(_to_text(content))})

    @staticmethod
    def from_json(text: bytes, path: Path) -> "Manifest":
        """Parse and check ``text``, the content of ``path``.

        Raises:
            InputError: If it is not JSON, has a different format version, lacks an entry, has an
                invalid one, for example a negative size or a file outside the folder, or differs
                from its checksum.
        """
        remedy = "Prepare the data set again with `python -m mtnrec.prepare`."
        try:
            content = json.loads(text, object_pairs_hook=_refuse_duplicates)
            json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
            version = content.pop("format_version")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path} is not the schema of a prepared data set. {remedy}"
            ) from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version!r}, but this version of mtnrec reads "
                f"{FORMAT_VERSION}. {remedy}"
            )
        checksum = content.pop(_CHECKSUM, None)
        try:
            schema = content.pop("schema")
            fields, multivalued = (
                tuple(CategoricalField(**field) for field in schema.pop(kind))
                for kind in ("categorical", "multivalued")
            )
            numerical, labels = tuple(schema.pop("numerical")), tuple(schema.pop("labels"))
            manifest = Manifest(
                schema=Schema(fields, numerical, labels, **schema, multivalued=multivalued),
                **content,
            )
            manifest._check()
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path} is damaged ({error}). {remedy}") from error
        if checksum not in (None, manifest.checksum):
            raise InputError(
                f"{path} is damaged or was changed: its checksum differs from its content. {remedy}"
            )
        return manifest

    def _check(self) -> None:
        holds = {
            "source": isinstance(self.source, str),
            "parameters": isinstance(self.parameters, dict),
            "rows": _is_table(self.rows, _is_count)
            and "train" in self.rows
            and self.rows.keys() == {"train", *test_splits(self.rows)},
            "positives": _is_table(self.positives, _counts),
            "missing": _is_table(self.missing, _counts) and self.missing.keys() >= self.rows.keys(),
            "transforms": _is_table(self.transforms, _is_transform),
            "report": _is_table(self.report, _is_count),
            "checksums": _is_table(self.checksums, lambda value: isinstance(value, str))
            and self.checksums.keys() <= self._files(),
        }
        if wrong := [name for name, right in holds.items() if not right]:
            raise InputError(f"no preparation can have written its {', '.join(wrong)}")

    def _files(self) -> set[str]:
        """Return the files that a folder may hold in addition to the schema."""
        schema = self.schema
        fields = (*schema.categorical, *schema.multivalued)
        bags = [bag_stem(field.name, part) for field in schema.multivalued for part in BAG_DTYPES]
        arrays = {f"{split}/{stem}.npy" for split in self.rows for stem in (*DTYPES, *bags)}
        return arrays | {f"vocabulary/{field.name}.parquet" for field in fields}

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest and, through its checksums, of the whole data set."""
        return _sha256(self.to_json())


def _to_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _is_table(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counts(value: Any) -> bool:
    return _is_table(value, _is_count)


def _is_transform(value: Any) -> bool:
    return (
        _is_table(value, lambda number: isinstance(number, int | float))
        and {"shift", "scale"} <= value.keys() <= {"fill", "shift", "scale"}
        and value["scale"] != 0
        and all(abs(number) <= LARGEST_NUMBER for number in value.values())
    )


def read_schema(path: Path) -> bytes:
    """Read ``schema.json``; warn if it has no checksum, since an earlier version wrote it.

    Raises:
        InputError: If it cannot be read, or is too long to be a schema.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_SCHEMA + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}). Prepare the data set again.") from error
    if len(text) > _LONGEST_SCHEMA:
        raise InputError(
            f"{path} has more than {_LONGEST_SCHEMA:,} bytes, so it is not a schema. "
            "Prepare the data set again."
        )
    if f'"{_CHECKSUM}":'.encode() not in text:
        warn_without_checksum(path)
    return text


def warn_without_checksum(path: Path) -> None:
    """Warn once, however the path is written, that damage to a file may go unnoticed."""
    _warn_once(path.resolve())


@cache
def _warn_once(path: Path) -> None:
    _logger.warning(
        "%s has no checksum, since an earlier version wrote it; damage may go unnoticed", path
    )
