"""A trained model that scores rows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checkpoint.bundle import (
    read_manifest,
    read_model,
    rebuild_network,
    vocabulary_files,
)
from mtnrec.checks import InputError, check_integer
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.raw.tabular import ArrowStream, check_types, missing_to_null, read_frame
from mtnrec.metric.task_metrics import task_probabilities
from mtnrec.run.folder import find_checkpoint
from mtnrec.serving.encoder import Encoder, read_vocabularies

_logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """Output of a model for a batch, on the CPU.

    Args:
        output: Log-probabilities of the labels.
        scores: Probabilities of the tasks, ``(B, tasks)``.
    """

    output: LogProbabilities
    scores: Tensor


class Scorer:
    """The model of a checkpoint, with the vocabularies that it was trained with.

    Args:
        network: Network in evaluation mode.
        manifest: Manifest of the prepared data set that it was trained on.
        encoder: Encoder of raw values.
        device: Device of the network.

    Attributes:
        tasks: Names of the tasks, ``ctr``, ``cvr`` and ``ctcvr`` on a funnel.
    """

    def __init__(
        self, network: nn.Module, manifest: Manifest, encoder: Encoder, device: torch.device
    ) -> None:
        self.network = network.to(device)
        self.manifest = manifest
        self.encoder = encoder
        self.device = device
        self.tasks = [task.name for task in manifest.schema.tasks]

    def score(self, frame: pd.DataFrame | ArrowStream, batch_size: int = 8192) -> pd.DataFrame:
        """Return the probability of each task for rows of raw values.

        Values not in the training rows count as missing; ``encoder.unseen`` counts them per
        field, and a field none of whose values was seen is logged as a warning.

        Args:
            frame: A frame of pandas, polars, pyarrow or any library with the Arrow PyCapsule stream
                interface, with a column for each field and feature of the data set, in any order;
                others are ignored.
            batch_size: Rows computed at a time.

        Returns:
            A column for each task, with the index of ``frame`` if it is of pandas.

        Raises:
            InputError: If a column is missing or holds invalid values.
        """
        check_integer("batch_size", batch_size, minimum=1)
        needed = {*self.encoder.columns, *self.encoder.lists}
        read = read_frame("the frame", frame, needed)[0]
        check_types("frame", "the frame", read.schema, self.encoder.lists)
        rows = missing_to_null(read)
        with warning_of_unseen(self.encoder):
            scores = self.score_raw(rows, "row {}".format, batch_size)
        index = frame.index if isinstance(frame, pd.DataFrame) else None
        return pd.DataFrame(scores, columns=self.tasks, index=index)

    def score_raw(
        self, frame: pl.DataFrame, place: Callable[[int], str], batch_size: int
    ) -> npt.NDArray[Any]:
        """Return the probabilities of the tasks, ``(rows, tasks)``.

        Args:
            frame: Input of :meth:`~mtnrec.serving.encoder.Encoder.encode`.
            place: Describes the place of a row in error messages.
            batch_size: Rows computed at a time.
        """
        parts = []
        for start in range(0, max(frame.height, 1), batch_size):
            place_in_batch = shifted(place, start)
            batch = self.encoder.encode(frame.slice(start, batch_size), place_in_batch)
            parts.append(self.score_batch(batch, place_in_batch).numpy())
        return np.concatenate(parts)

    def score_batch(self, batch: Batch, place: Callable[[int], str] = "row {}".format) -> Tensor:
        """Return the probabilities of the tasks, ``(B, tasks)``, on the CPU.

        CVR is ``pCTCVR / pCTR``, capped at 1 for models in which pCTCVR can exceed pCTR.

        Args:
            batch: Rows; labels are ignored.
            place: Describes the place of a row in error messages.

        Raises:
            InputError: If a probability is not finite.
        """
        return self.predict(batch, place).scores

    @torch.inference_mode()
    def predict(self, batch: Batch, place: Callable[[int], str] = "row {}".format) -> Prediction:
        """Return the output of the network and the scores; arguments as in :meth:`score_batch`."""
        output = self.network(batch.to(self.device))
        probabilities = task_probabilities(self.manifest.schema, output.positive)
        scores = torch.stack(probabilities, dim=1).cpu()
        finite = scores.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.int().argmin())
            raise InputError(
                f"{place(first)} has no finite probability: its numbers are not finite, or so "
                "large that float32 overflows, or the checkpoint's weights are not finite. Correct "
                "the row, or choose another checkpoint."
            )
        return Prediction(LogProbabilities(*(part.cpu() for part in output)), scores)


@contextmanager
def warning_of_unseen(encoder: Encoder) -> Iterator[None]:
    """Warn of each field none of whose values in the block occurs in the training rows."""
    known, unseen = dict(encoder.known), dict(encoder.unseen)
    yield
    for name, count in encoder.unseen.items():
        if count > unseen[name] and encoder.known[name] == known[name]:
            _logger.warning(
                "column %r: none of its %s values occurs in the training rows, so all are scored "
                "as missing. Check that they are written as in the training data",
                name,
                f"{count - unseen[name]:,}",
            )


def shifted(place: Callable[[int], str], start: int) -> Callable[[int], str]:
    """Return ``place`` for the rows of a slice that begins at row ``start``."""
    return lambda row: place(start + row)


def load_checkpoint(
    path: str | Path, device: str | None = None, *, allow: str | Sequence[str] = ()
) -> Scorer:
    """Load the model of a checkpoint that ``python -m mtnrec.train`` wrote.

    Args:
        path: Folder of a run, or ``checkpoints/best.ckpt`` in it.
        device: ``cpu``, ``cuda``, ...; by default a GPU if available.
        allow: Modules or packages whose networks the checkpoint may use in addition to mtnrec's,
            for example ``["my_models"]``. Their code runs, so name only modules that you trust.

    Raises:
        InputError: If it is missing, damaged, not written by mtnrec, too large for memory, or names
            a network that is not allowed.

    Example::

        from mtnrec import load_checkpoint

        scores = load_checkpoint("runs/esmm").score(frame)
    """
    path = find_checkpoint(Path(path))
    allow = [allow] if isinstance(allow, str) else allow
    content = read_model(path)
    manifest = read_manifest(content, path)
    encoder = Encoder(
        manifest.schema, read_vocabularies(vocabulary_files(content)), manifest.transforms
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        network = rebuild_network(content, manifest.schema, path, allow)
        return Scorer(network, manifest, encoder, place)
    except RuntimeError as error:
        raise InputError(f"device={device!r} cannot be used: {error}") from error
