"""AliExpress search logs (P. Li et al., CIKM 2020), one data set per country.

As published, a split is a user file (search id, 7 categorical, 23 numerical and 2 categorical
features) and an item file (search id, 47 features, label), comma-separated, without a header. They
are joined on the search id, within a split only, because ids restart in the test files. MTReclib
shares the joined rows as ``train.csv`` and ``test.csv``; the column names here are those of its
header.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mtnrec.checks import InputError, check_choice
from mtnrec.data.datamodule import DataModule
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.data.raw.archives import open_plain, open_zip
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block, read_blocks
from mtnrec.data.raw.files import (
    check_disk_space,
    find_one,
    list_files,
    raw_identity,
    require_raw_dir,
)
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.schema import Schema

_SPLITS = ("train", "test")
_PREPARED_BYTES_PER_TEXT_BYTE = 1.2  # to estimate the disk space needed


@dataclass(kw_only=True, eq=False, repr=False)
class AliExpress(DataModule):
    """One country of the AliExpress data set.

    The search id becomes the group, never a feature. Rows keep the order of the user file, and
    within a search that of the item file.

    Args:
        name: Name of the data set; ``aliexpress_<country>`` if empty.
        country: ``nl``, ``es``, ``fr``, ``us`` or ``ru``, the prefix of the raw file names.
        raw_dir: Folder with ``aliexpress_CC_datasets.zip``, or the four zips in it, or the four csv
            files in them, or MTReclib's ``train.csv`` and ``test.csv`` (or ``.csv.gz``); all give
            the same prepared arrays. Only ``prepare`` needs it; given to training, its files must
            be those that the set was prepared from.
        conversion_without_click: ``refuse`` a conversion without a click, or ``drop`` and count it;
            only MTReclib's files can contain one.
        on_error: ``refuse`` a row that breaks the format, or ``skip`` and count such rows.
    """

    origin: ClassVar[str] = (
        "Download Tianchi data set 74690 (https://tianchi.aliyun.com/dataset/74690), or MTReclib's "
        "train.csv and test.csv, which are read as they are."
    )

    name: str = ""
    country: str
    raw_dir: str | Path | None = None
    conversion_without_click: str = "refuse"
    on_error: str = "refuse"

    def __post_init__(self) -> None:
        self.name = self.name or f"aliexpress_{self.country}".lower()
        super().__post_init__()
        check_choice(
            "data.conversion_without_click", self.conversion_without_click, ["refuse", "drop"]
        )
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared data set, and the identity of the raw files."""
        keys = ("conversion_without_click", "on_error")
        country = self.country.lower()
        raw = raw_identity(self.raw_dir, lambda path: _find(path, country).paths, self._checksum)
        return {key: getattr(self, key) for key in keys} | raw

    def prepare(self) -> Manifest:
        """Read the raw files once, in bounded memory, and write the prepared data set.

        Memory holds 16 bytes per search and 4 bytes per row.

        Raises:
            InputError: If ``raw_dir`` is not given or lacks a file, the disk is too small, or a
                file breaks the format.
        """
        # Imported here: training needs no polars, whose import takes 0.1 s.
        from mtnrec.data.preparation.aliexpress import CATEGORICAL, LABELS, NUMERICAL, Join
        from mtnrec.data.prepared.vocabulary import encode_in_place

        raw_dir = require_raw_dir(self.raw_dir, self.origin)
        files = _find(raw_dir, self.country.lower())
        check_disk_space(files.paths, self.folder, _PREPARED_BYTES_PER_TEXT_BYTE)
        with write_prepared(self.folder, _SPLITS) as writer, ReadProgress() as meter:
            meter.log("Computing the checksums of the raw files")
            parameters = self.parameters
            join = Join(
                writer,
                meter,
                drops_orphans=self.conversion_without_click == "drop",
                bad_rows={split: BadRows(self.on_error) for split in _SPLITS},
            )
            for split in _SPLITS:
                if files.is_joined:
                    with files.blocks(split, meter) as blocks:
                        join.copy(split, blocks)
                    continue
                with tempfile.TemporaryFile(dir=writer.directory) as features:
                    with files.blocks(f"user_{split}", meter) as blocks:
                        searches = join.read_searches(split, blocks, features)
                    with files.blocks(f"item_{split}", meter) as blocks:
                        join.join(split, searches, blocks)
            meter.log("Replacing ids with indices and computing checksums")
            vocabularies = [values.vocabulary() for values in join.counts]
            fields = encode_in_place(writer, _SPLITS, CATEGORICAL, vocabularies)
            return writer.finish(
                source=self.name,
                parameters=parameters,
                schema=Schema(fields, NUMERICAL, LABELS, funnel=True),
                report=join.report(),
            )


@dataclass(frozen=True)
class _Files:
    """Raw files of a country.

    Args:
        country: Prefix of the file names.
        paths: ``train.csv`` and ``test.csv``; or the outer zip; or four files, zip or csv.
        is_joined: Whether they are MTReclib's joined files.
    """

    country: str
    paths: list[Path]
    is_joined: bool

    @contextmanager
    def blocks(self, part: str, meter: ReadProgress) -> Iterator[Iterator[Block]]:
        """Open ``train`` or ``test`` of joined files, else ``user_train`` etc."""
        with ExitStack() as stack:
            if self.is_joined:
                path = next(path for path in self.paths if path.name.lower().startswith(part))
                yield read_blocks(stack.enter_context(open_plain(path, meter)), str(path))
                return
            stem = f"{self.country}_{part}"
            path = self.paths[0] if len(self.paths) == 1 else self._part_path(stem)
            stream, source = stack.enter_context(meter.open(path)), str(path)
            if len(self.paths) == 1:
                members = [f"{self.country}_{name}.zip" for name in _PARTS]
                open_member = stack.enter_context(open_zip(stream, source, members))
                stream = stack.enter_context(open_member(f"{stem}.zip"))
                source = f"{source}:{stem}.zip"
            if source.lower().endswith(".zip"):
                open_member = stack.enter_context(open_zip(stream, source, [f"{stem}.csv"]))
                stream = stack.enter_context(open_member(f"{stem}.csv"))
                source = f"{source}:{stem}.csv"
            yield read_blocks(stream, source)

    def _part_path(self, stem: str) -> Path:
        return next(path for path in self.paths if path.name.lower().startswith(stem))


_PARTS = tuple(f"{table}_{split}" for split in _SPLITS for table in ("user", "item"))


def _find(raw_dir: Path, country: str) -> _Files:
    """Find the raw files, in any of their four forms, by name.

    Raises:
        InputError: If no form is found, one is incomplete, or there are several.
    """
    files = list_files(raw_dir)
    top_level = {
        name: [path for path in paths if path.parent == raw_dir] for name, paths in files.items()
    }
    outer = find_one(files, [f"aliexpress_{country}_datasets.zip"])
    stems = [f"{country}_{part}" for part in _PARTS]
    parts = {stem: find_one(files, [f"{stem}.csv", f"{stem}.zip"]) for stem in stems}
    joined = {split: find_one(top_level, [f"{split}.csv", f"{split}.csv.gz"]) for split in _SPLITS}
    forms = [
        ([outer], False),
        ([parts[stem] for stem in stems], False),
        ([joined[split] for split in _SPLITS], True),
    ]
    found = [form for form in forms if any(form[0])]
    if not found:
        raise InputError(
            f"{raw_dir} holds none of aliexpress_{country}_datasets.zip, {stems[0]}.zip or .csv "
            f"and the three other parts, or train.csv and test.csv. {AliExpress.origin}"
        )
    if len(found) > 1:
        names = [next(path.name for path in form if path) for form, _ in found]
        raise InputError(
            f"{raw_dir} must hold the log in one form, got several forms ({', '.join(names)}). "
            "Delete all but one, or set data.raw_dir to a folder with one."
        )
    paths, is_joined = found[0]
    wanted = _SPLITS if is_joined else stems
    if missing := [name for name, path in zip(wanted, paths, strict=False) if path is None]:
        ending = "csv or .csv.gz" if is_joined else "zip or .csv"
        raise InputError(f"{raw_dir} lacks {', '.join(f'{n}.{ending}' for n in missing)}")
    return _Files(country, [path for path in paths if path is not None], is_joined)
