"""A trained model that scores rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import torch
from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.checkpoint.bundle import read_manifest, read_model, rebuild_network, vocabulary_files
from mtnrec.checks import InputError, check_integer
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.metric.task_metrics import task_probabilities
from mtnrec.serving.encoder import Encoder, read_vocabularies


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

    def score(self, frame: pd.DataFrame, batch_size: int = 8192) -> pd.DataFrame:
        """Return the probability of each task for rows of raw values.

        Values not in the training rows count as missing; ``encoder.unseen`` counts them per
        field.

        Args:
            frame: A column for each field and feature of the data set, in any order; others are
                ignored.
            batch_size: Rows computed at a time.

        Returns:
            A column for each task, with the index of ``frame``.

        Raises:
            InputError: If a column is missing or holds invalid values.
        """
        check_integer("batch_size", batch_size, minimum=1)
        needed = {*self.encoder.columns, *self.encoder.lists}
        columns = [name for name in frame.columns if name in needed]
        rows = pl.from_pandas(frame[columns], nan_to_null=True)
        scores = self.score_raw(rows, "row {}".format, batch_size)
        return pd.DataFrame(scores, columns=self.tasks, index=frame.index)

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

    @torch.inference_mode()
    def score_batch(self, batch: Batch, place: Callable[[int], str] = "row {}".format) -> Tensor:
        """Return the probabilities of the tasks, ``(B, tasks)``, on the CPU.

        CVR is ``pCTCVR / pCTR``, capped at 1 for models in which pCTCVR can exceed pCTR.

        Args:
            batch: Rows; labels are ignored.
            place: Describes the place of a row in error messages.

        Raises:
            InputError: If a probability is not finite.
        """
        positive = self.network(batch.to(self.device)).positive
        scores = torch.stack(task_probabilities(self.manifest.schema, positive), dim=1).cpu()
        finite = scores.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.int().argmin())
            raise InputError(
                f"{place(first)} has no finite probability: its numbers are not finite, or so "
                "large that float32 overflows, or the checkpoint's weights are not finite. Correct "
                "the row, or choose another checkpoint."
            )
        return scores


def shifted(place: Callable[[int], str], start: int) -> Callable[[int], str]:
    """Return ``place`` for the rows of a slice that begins at row ``start``."""
    return lambda row: place(start + row)


def load_checkpoint(path: str | Path, device: str | None = None) -> Scorer:
    """Load the model of a checkpoint that ``python -m mtnrec.train`` wrote.

    Args:
        path: ``checkpoints/best.ckpt`` in the folder of a run.
        device: ``cpu``, ``cuda``, ...; by default a GPU if available.

    Raises:
        InputError: If it is missing, damaged, not written by mtnrec, or too large for memory.

    Example::

        from mtnrec import load_checkpoint

        scores = load_checkpoint("runs/esmm/checkpoints/best.ckpt").score(frame)
    """
    path = Path(path)
    content = read_model(path)
    manifest = read_manifest(content, path)
    encoder = Encoder(
        manifest.schema, read_vocabularies(vocabulary_files(content)), manifest.transforms
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        return Scorer(rebuild_network(content, manifest.schema, path), manifest, encoder, place)
    except RuntimeError as error:
        raise InputError(f"device={device!r} cannot be used: {error}") from error
