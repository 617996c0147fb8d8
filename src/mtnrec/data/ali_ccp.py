"""Ali-CCP click and conversion logs (X. Ma et al., SIGIR 2018).

The skeleton has one line per impression, with its labels, its own features and the index of a line
of common features, which describe the user and are shared by about 58 impressions. See
:mod:`mtnrec.data.raw.triples` for the line format.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mtnrec.checks import InputError, check_choice, check_integer
from mtnrec.data.datamodule import DataModule
from mtnrec.data.preparation.ali_ccp import COMMON_FIELDS, SKELETON_FIELDS, USER, Columns, Log
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.vocabulary import encode_in_place
from mtnrec.data.prepared.writer import Writer, write_prepared
from mtnrec.data.raw.archives import read_tar
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block, map_in_order, read_blocks
from mtnrec.data.raw.files import (
    check_disk_space,
    find_one,
    list_files,
    raw_identity,
    require_raw_dir,
)
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.data.raw.triples import MISSING
from mtnrec.schema import CategoricalField, Schema
from mtnrec.system.resources import available_cores

MULTI_VALUED = ("109_14", "110_14", "127_14", "150_14", "210", "853")
LABELS = ("click", "conversion")

_SPLITS = ("train", "test")
# YAML and Hydra read 109_14 as the integer 10914.
_BY_NUMBER = {field.replace("_", ""): field for field in COMMON_FIELDS + SKELETON_FIELDS}
_PROFILE = ("121", "122", "124", "125", "126", "127", "128", "129")
# To estimate the disk space needed: text per impression with its share of common features, and what
# all tokens of all multi-valued fields add to a prepared row.
_TEXT_BYTES_PER_ROW, _BAG_BYTES_PER_ROW = 450, 250


@dataclass(frozen=True)
class _Preset:
    fields: tuple[str, ...]
    values: tuple[str, ...]
    min_count: int
    tokens: str
    scaling: str


PRESETS = {
    "aitm": _Preset(
        fields=(*(USER, *_PROFILE, "205", "206", "207", "216", "508", "509", "702", "853", "301"),),
        values=(),
        min_count=12,
        tokens="last",
        scaling="none",
    ),
    "rechub": _Preset(
        fields=(
            *(USER, *_PROFILE, "205", "206", "207", "210", "216", "508", "509", "702", "853"),
            *("301", "109_14", "110_14", "127_14", "150_14"),
        ),
        values=("109_14", "110_14", "127_14", "150_14", "508", "509", "702", "853"),
        min_count=10,
        tokens="last",
        scaling="minmax",
    ),
}
_FREE = _Preset(fields=(), values=(), min_count=1, tokens="last", scaling="none")


@dataclass(kw_only=True, eq=False, repr=False)
class AliCcp(DataModule):
    """Ali-CCP with the fields of a published preparation or a custom choice.

    Preset ``aitm`` keeps the 18 fields of AITM (D. Xi et al., KDD 2021) and ids that occur in at
    least 12 training rows. Preset ``rechub`` keeps the 23 fields and 8 values of torch-rechub and
    ids in at least 10 rows; values are scaled by the range of the training rows, whereas the
    original's scalers saw validation and test rows. The keys after ``preset`` override its choices;
    without a preset, ``fields`` or ``values`` must be given. All of them affect only ``prepare``.

    The user id (field 101) becomes the group; rows without one are grouped by their common line and
    have a negative group. Conversions without a click are dropped and counted.

    Args:
        raw_dir: Folder with ``sample_train.tar.gz`` and ``sample_test.tar.gz``, or with the four
            files in them; only ``prepare`` needs it. Given to training, its files must be those
            that the set was prepared from.
        preset: ``aitm``, ``rechub`` or None.
        fields: Fields whose ids are features, e.g. ``["101", "205", "109_14"]``.
        values: Fields whose value is a numerical feature, 0 where a row lacks it.
        min_count: Minimum number of training rows with an id, or of occurrences in them of a bag
            token; one number, or one per field.
        tokens: Triples of a field to keep: the ``last`` or ``first`` or, for multi-valued fields,
            ``all``; one word, or one per field.
        scaling: ``minmax``, by the range of the training rows, or ``none``.
        on_error: ``refuse`` a line that breaks the format, or ``skip`` and count such lines.
        threads: Number of parsing threads; None for one per core. The result is the same.
    """

    origin: ClassVar[str] = (
        "Download Tianchi data set 408 (https://tianchi.aliyun.com/dataset/408): "
        "sample_train.tar.gz and sample_test.tar.gz."
    )

    name: str = "ali_ccp"
    raw_dir: str | Path | None = None
    preset: str | None = "aitm"
    fields: list[str] | None = None
    values: list[str] | None = None
    min_count: int | dict[str, int] | None = None
    tokens: str | dict[str, str] | None = None
    scaling: str | None = None
    on_error: str = "refuse"
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)
        if self.threads is not None:
            check_integer("data.threads", self.threads, minimum=1, maximum=1024)
        preset = _FREE
        if self.preset is not None:
            check_choice("data.preset", self.preset, list(PRESETS))
            preset = PRESETS[self.preset]
        fields = _names("data.fields", preset.fields if self.fields is None else self.fields)
        self._values = _names("data.values", preset.values if self.values is None else self.values)
        self._scaling = preset.scaling if self.scaling is None else self.scaling
        check_choice("data.scaling", self._scaling, ["minmax", "none"])
        self._min_count = _by_field("data.min_count", self.min_count, preset.min_count, fields)
        for count in self._min_count.values():
            check_integer("data.min_count", count, minimum=1)
        self._choose_tokens(fields, preset.tokens)

    def _choose_tokens(self, fields: list[str], default: str) -> None:
        tokens = _by_field("data.tokens", self.tokens, default, [*fields, *self._values])
        for name, choice in tokens.items():
            check_choice("data.tokens", choice, ["last", "first", "all"])
            if choice == "all" and isinstance(self.tokens, dict) and name not in MULTI_VALUED:
                raise InputError(
                    f"data.tokens must be last or first for field {name}, which has one value per "
                    f"row, got all. Multi-valued fields are {', '.join(MULTI_VALUED)}."
                )
        self._bags = [n for n in fields if tokens[n] == "all" and n in MULTI_VALUED]
        self._ids = [name for name in fields if name not in self._bags]
        self._first = [name for name, choice in tokens.items() if choice == "first"]

    @property
    def _folder_name(self) -> str:
        return f"{self.name}-{self.preset}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared data set, and the identity of the raw files."""
        raw = raw_identity(
            self.raw_dir,
            lambda folder: [path for split in _SPLITS for path in _find(folder, split)],
            self._checksum,
        )
        return {
            "preset": self.preset,
            "fields": self._ids,
            "multivalued": self._bags,
            "values": self._values,
            "min_count": self._min_count,
            "first": self._first,
            "scaling": self._scaling,
            "on_error": self.on_error,
        } | raw

    def _find_differing(self, found: dict[str, Any]) -> dict[str, Any]:
        is_chosen = self._ids or self._bags or self._values
        return super()._find_differing(found) if is_chosen else {}

    def prepare(self) -> Manifest:
        """Read the raw files once, in bounded memory, and write the prepared data set.

        Memory holds the common features (about 100 bytes per line) and the vocabularies, regardless
        of the number of rows.

        Raises:
            InputError: If ``raw_dir`` is not given or lacks a file, the disk is too small, or a
                file breaks the format.
        """
        raw_dir = require_raw_dir(self.raw_dir, self.origin)
        if not self._ids and not self._bags and not self._values:
            raise InputError(
                f"data.preset must be one of {', '.join(PRESETS)} unless data.fields or "
                "data.values names a field, got none. Choose a preset, or set data.fields."
            )
        parts = {split: _find(raw_dir, split) for split in _SPLITS}
        sources = [path for found in parts.values() for path in found]
        check_disk_space(sources, self.folder, self._bytes_per_text_byte)
        threads = self.threads or available_cores()
        bad_rows = {split: BadRows(self.on_error) for split in _SPLITS}
        with (
            write_prepared(self.folder, _SPLITS) as writer,
            ReadProgress() as meter,
            ThreadPoolExecutor(threads) as pool,
        ):
            meter.log("Computing the checksums of the raw files")
            parameters = self.parameters
            logs = {}
            for split in _SPLITS:
                log = logs[split] = Log(split, self._columns, writer, meter, bad_rows[split])
                for name, blocks in _read(parts[split], split, meter):
                    if name.startswith("common"):
                        log.read_common(map_in_order(pool, log.parse_common, blocks, ahead=threads))
                    else:
                        log.read_skeleton(map_in_order(pool, log.join, blocks, ahead=threads))
            writer.close_arrays()
            for bad in bad_rows.values():
                bad.warn()
            report = {name: n for log in logs.values() for name, n in log.finish().items()}
            meter.log("Replacing ids with indices and computing checksums")
            if self._scaled:
                meter.log(
                    "Values are scaled by the range of the training rows alone; test values may "
                    "lie outside [0, 1]"
                )
            schema, transforms = self._encode(writer, logs["train"], threads)
            return writer.finish(
                source=self.name,
                parameters=parameters,
                schema=schema,
                report=report,
                transforms=transforms,
            )

    @property
    def _scaled(self) -> bool:
        return self._scaling == "minmax" and bool(self._values)

    @property
    def _columns(self) -> Columns:
        return Columns(self._ids, self._values, self._bags, self._first)

    @property
    def _bytes_per_text_byte(self) -> float:
        row = 4 * len(self._ids) + 4 * len(self._values) + 4 * len(self._bags) + 10
        bags = _BAG_BYTES_PER_ROW if self._bags else 0
        return (row + bags) / _TEXT_BYTES_PER_ROW

    def _encode(
        self, writer: Writer, train: Log, threads: int
    ) -> tuple[Schema, dict[str, dict[str, float]]]:
        """Replace raw ids and values in the arrays with indices and scaled values."""
        vocabularies = [
            train.counts[name].vocabulary(min_count=self._min_count[name], missing=MISSING)
            for name in self._ids
        ]
        fields = encode_in_place(writer, _SPLITS, self._ids, vocabularies, threads=threads)
        multivalued = tuple(self._encode_bags(writer, train, name, threads) for name in self._bags)
        transforms = {}
        if self._scaled:
            shift, scale = train.lowest, train.highest - train.lowest
            scale = np.where(scale > 0, scale, 1.0)
            for split in _SPLITS:
                writer.rewrite(
                    split, "numerical", lambda rows: (rows - shift) / scale, threads=threads
                )
            for column, name in enumerate(self._columns.value_names):
                transforms[name] = {
                    "fill": 0.0,
                    "shift": float(shift[column]),
                    "scale": float(scale[column]),
                }
        schema = Schema(fields, self._columns.value_names, LABELS, True, multivalued)
        return schema, transforms

    def _encode_bags(self, writer: Writer, train: Log, name: str, threads: int) -> CategoricalField:
        vocabulary = train.count_tokens(name).vocabulary(min_count=self._min_count[name])
        for split in _SPLITS:
            writer.rewrite(split, bag_stem(name, "tokens"), vocabulary.encode, threads=threads)
        return vocabulary.write(writer.directory, name)


def _names(key: str, given: Sequence[Any]) -> list[str]:
    """Return a list of field names after checking it."""
    if not isinstance(given, list | tuple):
        raise InputError(f"{key} must be a list of fields, got {given!r}")
    names = [_BY_NUMBER.get(str(name), str(name)) for name in given]
    for name in names:
        if name not in COMMON_FIELDS + SKELETON_FIELDS:
            raise InputError(
                f"{key} must be fields of Ali-CCP ({', '.join(_BY_NUMBER.values())}), got {name!r}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"{key} must name each field once, got {', '.join(names)}")
    return names


def _by_field(key: str, given: Any, default: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Expand a setting, one value or a mapping for some fields, to a value per field."""
    if not isinstance(given, dict):
        return dict.fromkeys(fields, default if given is None else given)
    named = dict(zip(_names(key, list(given)), given.values(), strict=True))
    if unknown := [name for name in named if name not in fields]:
        raise InputError(f"{key} must name fields of data.fields, got {', '.join(unknown)}")
    return dict.fromkeys(fields, default) | named


def _find(raw_dir: Path, split: str) -> list[Path]:
    """Return a split's archive, or its two files with the common features first."""
    files = list_files(raw_dir)
    archive = find_one(files, [f"sample_{split}.tar.gz"])
    plain = [find_one(files, [name]) for name in _members(split)]
    missing = [name for name, path in zip(_members(split), plain, strict=True) if path is None]
    if archive is not None and len(missing) < len(plain):
        raise InputError(
            f"{raw_dir} must not hold both {archive.name} and files from it. Delete one of them, "
            "or set data.raw_dir to a folder with one."
        )
    if archive is not None:
        return [archive]
    if missing:
        raise InputError(
            f"{raw_dir} holds neither sample_{split}.tar.gz nor {' and '.join(missing)}. "
            f"{AliCcp.origin}"
        )
    return [path for path in plain if path is not None]


def _members(split: str) -> tuple[str, str]:
    return f"common_features_{split}.csv", f"sample_skeleton_{split}.csv"


def _read(
    paths: list[Path], split: str, meter: ReadProgress
) -> Iterator[tuple[str, Iterator[Block]]]:
    """Yield the name and the blocks of the common features, then of the skeleton."""
    if len(paths) == 1:
        for name, stream in read_tar(paths[0], _members(split), meter):
            yield name, read_blocks(stream, f"{paths[0]}:{name}")
        return
    for path, name in zip(paths, _members(split), strict=True):
        with meter.open(path) as stream:
            yield name, read_blocks(stream, str(path))
