"""LightningDataModule of every prepared data set: splits, batches, counts."""

import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from mtnrec.arrays import BoolArray, Int64Array, UInt8Array
from mtnrec.batch import Batch
from mtnrec.checks import InputError, check_choice, check_flag, check_integer, check_number
from mtnrec.data.batches import RowGatherer, RowIndices
from mtnrec.data.noise import Noise
from mtnrec.data.prepared.layout import test_splits
from mtnrec.data.prepared.manifest import SCHEMA_FILE, Manifest, NotPreparedError
from mtnrec.data.prepared.store import (
    Arrays,
    expect_scattered_reads,
    open_prepared,
)
from mtnrec.data.prepared.verify import IDENTITIES, find_changed, noted_sha256, verify_once
from mtnrec.data.samplers import (
    EvaluationSampler,
    RepeatedSampler,
    TrainLoader,
    TrainSampler,
    permutation,
    row_dtype,
)
from mtnrec.schema import Schema
from mtnrec.system.resources import memory_bytes

_READERS = 32  # concurrent reads; more bring little
_MEMORY_SHARE = 0.75  # for cached pages of a split; the rest is for the process itself

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(L.LightningDataModule, ABC):
    """Feeds the splits of a prepared data set; a subclass prepares one.

    A share of the training rows is the validation set: drawn at random (paper, section 3.1), or
    whole groups (users, searches) drawn at random, or the last rows.

    The attribute ``noise``, set before ``setup``, replaces features and flips labels of the
    batches; None changes nothing. Test sets other than ``test`` have none.

    Args:
        name: Name of the data set, as in the config group ``data``.
        dir: Folder of the prepared data set. None for the folder that the YAML file names (usually
            ``name``) in ``$MTNREC_DATA`` or, if that is not set, in ``data``.
        batch_size: Rows per batch in each process.
        validation_share: Share of the training rows used for validation, in (0, 1).
        validation_split: ``random``, ``grouped`` or ``last``.
        split_seed: Seed of the random validation split.
        seed: Seed of the order of the training rows, which is a function of (seed, epoch, rank).
        verify: Whether to compare every file with its checksum before training, which reads all
            bytes; done once, and again if a file has changed since.
    """

    origin: ClassVar[str] = ""

    name: str
    dir: str | Path | None = None
    batch_size: int = 2048
    validation_share: float = 0.2
    validation_split: str = "random"
    split_seed: int = 0
    seed: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        check_integer("data.batch_size", self.batch_size, minimum=1)
        check_number(
            "data.validation_share", self.validation_share, minimum=0, maximum=1, open_maximum=True
        )
        if self.validation_share == 0:
            raise InputError(
                "data.validation_share must be above 0, got 0. Validation chooses the epoch."
            )
        check_choice("data.validation_split", self.validation_split, ["random", "grouped", "last"])
        check_integer("data.split_seed", self.split_seed, minimum=0)
        check_integer("data.seed", self.seed, minimum=0)
        check_flag("data.verify", self.verify)
        if self.dir is None:
            self.dir = Path(os.environ.get("MTNREC_DATA", "data"), self._folder_name)
        self.dir = Path(self.dir)
        self.noise: Noise | None = None
        self.reads_test = True  # False: no array of the test rows is mapped
        self._verified = False
        self._arrays: dict[str, Arrays] | None = None
        self._original: DataModule | None = None
        # Settings that the user gave; the commands add theirs.
        self.given: set[str] = getattr(self, "given", set())

    def copy_for_run(self) -> "DataModule":
        """Return a copy with the same folder, not set up, for a run that sets seed and noise."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.noise, copied._arrays = None, None
        copied._original = self  # kept alive, since a temporary folder is deleted with it
        return copied

    @property
    def _folder_name(self) -> str:
        """Name of the default folder; mirrors ``dir`` in the YAML file."""
        return self.name

    @property
    def folder(self) -> Path:
        """``dir`` as a path."""
        return Path(cast(Path, self.dir))

    @abstractmethod
    def prepare(self) -> Manifest:
        """Write the prepared data set from its raw files."""

    def prepare_data(self) -> None:
        """Check that the prepared data set exists and is intact.

        Raises:
            InputError: If it is missing (the message names its origin and the command that prepares
                it) or damaged.
        """
        manifest, _ = self._open_prepared()
        if self.verify and not self._verified:
            verify_once(self.folder, manifest)
            self._verified = True
        if differing := self._find_differing(manifest.parameters):
            raise InputError(
                f"{self._describe_differing(manifest.parameters, differing)} Choose another "
                "data.dir, leave out or correct these settings, or prepare it again with them "
                "(`python -m mtnrec.prepare ... overwrite=true`, or `prepare()` in Python)."
            )
        for path in find_changed(manifest.parameters, self._raw_note):
            _logger.warning(
                "%s has changed since %s was prepared from it, but the prepared rows are used. "
                "Prepare the set again (overwrite=true) to use the new ones",
                path,
                self.folder,
            )

    def check_replaceable(self) -> None:
        """Refuse to replace a prepared data set with different settings.

        Raises:
            InputError: If the folder holds one.
        """
        try:
            found = open_prepared(self.folder)[0]
        except InputError:  # missing, or damaged
            return
        parameters = {"name": found.source, **found.parameters}
        differing = self._find_differing(found.parameters)
        if found.source != self.name:
            differing = {"name": self.name} | differing
        if differing:
            raise InputError(
                f"{self._describe_differing(parameters, differing)} Set overwrite=true to replace "
                "it, or choose another data.name or data.dir."
            )

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared bytes; stored in the manifest."""
        return {}

    @property
    def _raw_note(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.raw")

    def _checksum(self, file: Path) -> str:
        """Return the SHA-256 of a raw file; computed again only if the file has changed."""
        return noted_sha256(file, self._raw_note)

    def _find_differing(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that differ from the stored ones, ``found``."""
        return {key: v for key, v in self.parameters.items() if key in found and found[key] != v}

    def _describe_differing(self, found: dict[str, Any], differing: dict[str, Any]) -> str:
        parts = [
            f"{key}: other files or content"
            if key in IDENTITIES
            else f"{key}: {str(found.get(key))[:40]} there, {str(value)[:40]} here"
            for key, value in differing.items()
        ]
        return (
            f"{self.folder} holds a {self.name} data set with different settings "
            f"({'; '.join(parts)})."
        )

    def settings_used(self) -> dict[str, Any]:
        """Return settings of the prepared set that replace those of this object in a record."""
        return {}

    def _open_prepared(self) -> tuple[Manifest, dict[str, Arrays]]:
        try:
            return open_prepared(self.folder)
        except NotPreparedError as error:
            lines = [str(error), self.origin, self._how_to_prepare()]
            raise NotPreparedError("\n".join(filter(None, lines))) from error

    def find_checksum(self) -> str | None:
        """Return the checksum of the prepared data set; None if it is not prepared."""
        try:
            return open_prepared(self.folder)[0].checksum
        except NotPreparedError:
            return None

    def _how_to_prepare(self) -> str:
        return f"Then: python -m mtnrec.prepare data={self.name} data.raw_dir=DIR"

    def setup(self, stage: str | None = None) -> None:
        """Map the arrays and draw the validation rows."""
        if self._arrays is not None:
            return
        self.manifest, arrays = self._open_prepared()
        rows = {"train": 0, "test": 0, **self.manifest.rows}
        validates = self._validates(rows["train"], arrays["train"].get("group"))
        if not 0 < np.count_nonzero(validates) < rows["train"] or not all(rows.values()):
            tests = {split: count for split, count in rows.items() if split != "train"}
            raise InputError(
                f"{self.dir} must have enough rows to train, validate on a share of "
                f"{self.validation_share} and test, got {rows['train']} training and "
                f"{' and '.join(f'{count} {split}' for split, count in tests.items())} rows"
            )
        self._rows: dict[str, RowIndices] = {
            "train": np.flatnonzero(~validates).astype(row_dtype(rows["train"])),
            "val": np.flatnonzero(validates).astype(row_dtype(rows["train"])),
            **{
                split: np.arange(rows[split], dtype=row_dtype(rows[split]))
                for split in self.test_splits
            },
        }
        if self.noise is not None:
            self.noise.learn(self.schema, arrays["train"])
        self._arrays = {
            "val": arrays["train"],
            **{name: part for name, part in arrays.items() if self.reads_test or name == "train"},
        }

    def _validates(self, rows: int, group: Int64Array | None) -> BoolArray:
        """Return which training rows are validation rows."""
        rng = np.random.default_rng(self.split_seed)
        if self.validation_split == "grouped":
            if group is None:
                raise InputError(
                    f"{self.dir} must have groups for data.validation_split=grouped, got none. "
                    "Choose random or last."
                )
            groups, member = np.unique(group, return_inverse=True)
            drawn = rng.permutation(len(groups)) < round(self.validation_share * len(groups))
            return drawn[member]
        validates = np.zeros(rows, np.bool_)
        count = round(self.validation_share * rows)
        if self.validation_split == "random":
            validates[permutation(rng, rows)[:count]] = True
        else:
            validates[rows - count :] = True
        return validates

    @property
    def schema(self) -> Schema:
        """Fields and labels; available after ``setup``."""
        return self.manifest.schema

    @property
    def test_splits(self) -> list[str]:
        """Names of the test sets, ``test`` first; available after ``setup``."""
        return test_splits(self.manifest.rows)

    @property
    def split_rows(self) -> dict[str, int]:
        """Number of rows of train, val and each test set; available after ``setup``."""
        return {split: len(rows) for split, rows in self._rows.items()}

    @property
    def row_numbers(self) -> dict[str, RowIndices]:
        """Row numbers of each split in its file; available after ``setup``."""
        return self._rows

    def column(self, split: str, stem: str) -> npt.NDArray[Any] | None:
        """Return one array of a split (e.g. ``labels``) in evaluation order; None if absent.

        The array is as prepared: noise affects batches and ``split_labels`` only.
        """
        arrays, rows = self.stored(split)
        array = arrays.get(stem)
        return None if array is None else np.asarray(array).take(rows, axis=0)

    def split_labels(self, split: str) -> UInt8Array:
        """Return the labels of a split, ``(rows, T)``, in evaluation order, with label noise."""
        labels = self._stored_labels(split)
        if self.noise is not None:
            self.noise.flip_labels(split, self._rows[split], labels)
        return labels

    def _stored_labels(self, split: str) -> UInt8Array:
        arrays, rows = self.stored(split)
        return np.asarray(arrays["labels"]).take(rows, axis=0)

    def record_noise(self) -> dict[str, Any]:
        """Return the record of the noise, :meth:`~mtnrec.data.noise.Noise.record`."""
        if self.noise is None or self._arrays is None:
            raise RuntimeError("set the noise before setup()")
        rows = {split: self._rows[split] for split in self._arrays}
        noisy = [split for split in rows if split in self.noise.splits and self.noise.flips_labels]
        return self.noise.record(rows, {split: self._stored_labels(split) for split in noisy})

    def stored(self, split: str) -> tuple[Arrays, RowIndices]:
        """Return the arrays that hold a split, and the row numbers of the split in them."""
        if self._arrays is None:
            raise RuntimeError("call setup() first")
        return self._arrays[split], self._rows[split]

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        rows = len(self._rows["train"])
        if rows < world_size:
            raise InputError(
                f"each process must have a training row, got {rows} rows for {world_size} processes"
            )
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        kind = RepeatedSampler if overfits else TrainSampler
        sampler = kind(rows, self.batch_size, self.seed, rank, world_size)
        return self._loader("train", sampler, TrainLoader)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of ``test``, or one loader per test set if there are several."""
        loaders = [self._evaluation_loader(split) for split in self.test_splits]
        return loaders if len(loaders) > 1 else loaders[0]

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        rows = len(self._rows[split])
        return self._loader(split, EvaluationSampler(rows, self.batch_size, rank, world_size))

    def _loader(
        self,
        split: str,
        sampler: "Sampler[Any]",
        loader: type[DataLoader[Batch]] = DataLoader[Batch],
    ) -> DataLoader[Batch]:
        change = None if self.noise is None else partial(self.noise.apply, split)
        arrays, rows = self.stored(split)
        readers = 1
        if split == "train" and self._exceeds_memory(arrays):
            # Separate maps, since validation reads the same file in order.
            arrays = open_prepared(self.folder)[1]["train"]
            expect_scattered_reads(arrays)
            readers = _READERS
        return loader(
            RowGatherer(arrays, rows, self.schema, change, readers),
            batch_size=None,  # the sampler yields whole batches of row positions
            sampler=sampler,
            pin_memory=self._feeds_a_gpu(),
            generator=torch.Generator(),  # else it would draw from the global generator
        )

    def _exceeds_memory(self, arrays: Arrays) -> bool:
        size, memory = sum(array.nbytes for array in arrays.values()), memory_bytes()
        if size <= _MEMORY_SHARE * memory:
            return False
        _logger.info(
            "the training rows of %s (%.1f GB) do not fit in memory (%.1f GB) and are read from "
            "disk throughout",
            self.dir,
            size / 1e9,
            memory / 1e9,
        )
        return True

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        # Lightning's own version would wait for the GPU to finish the previous step.
        return batch.to(device, non_blocking=device.type == "cuda")

    def _feeds_a_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


@dataclass(kw_only=True, eq=False, repr=False)
class SelfPreparing(DataModule):
    """Data set that training prepares if its folder is missing or empty."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared bytes; stored in the manifest."""

    def _how_to_prepare(self) -> str:
        return "Call prepare_data() first."

    def prepare_data(self) -> None:
        """Prepare the data set if its folder is missing or empty.

        Raises:
            InputError: If the folder was prepared with different settings.
        """
        if not (self.folder / SCHEMA_FILE).is_file():
            self.prepare()
        super().prepare_data()

    def _find_differing(self, found: dict[str, Any]) -> dict[str, Any]:
        return {key: v for key, v in self.parameters.items() if found.get(key) != v}
