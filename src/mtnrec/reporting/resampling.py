"""AUCs of a run on resampled test rows, from its kept scores.

Whole groups (users, searches) are drawn with replacement, since the rows of a group are not
independent (the cluster bootstrap: Davison & Hinkley, 1997, section 3.8); single rows where the
data has no groups. A resample is the number of times that each group is drawn. All runs see the
same resamples, so that arms are compared on the same draws.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from mtnrec.arrays import BoolArray, Float32Array, Float64Array, Int64Array
from mtnrec.reporting.runs import Run, Runs
from mtnrec.run.scores import Scores, read_scores

_SEED = 0
_NUMBERS = 1 << 22  # of a chunk of resamples: 32 MiB, a few times


class GroupedAuc:
    """AUC of scores, ties counted half, as a function of how often each group is drawn.

    The scores are sorted once. Between two positives all negatives of a group count alike, so that
    an AUC is two products of sparse matrices, (distinct positive scores, groups), with the numbers
    of draws, and a sum along the sorted scores.

    Args:
        scores: ``(n,)``, without NaN; only their order matters.
        labels: ``(n,)``.
        groups: Number of each row's group, ``(n,)``, below ``count``.
        count: Number of groups.
    """

    def __init__(
        self, scores: Float32Array, labels: BoolArray, groups: Int64Array, count: int
    ) -> None:
        values, places = np.unique(scores[labels], return_inverse=True)
        negatives, of_negatives = scores[~labels], groups[~labels]
        self._positives = _counts(places, groups[labels], (len(values), count))
        # A negative loses to each larger positive twice, and once to an equal one.
        ends = [values.searchsorted(negatives, side) for side in ("left", "right")]
        rows, columns = np.concatenate(ends), np.concatenate([of_negatives, of_negatives])
        loses = rows < len(values)
        self._losses = _counts(rows[loses], columns[loses], (len(values), count))
        self._classes = np.stack(
            [np.bincount(groups[labels == label], minlength=count) for label in (False, True)]
        )
        self.distinct = len(values)

    def __call__(self, draws: Float64Array) -> Float64Array:
        """Return the AUC of each resample; NaN where a class is absent.

        Args:
            draws: Number of times that each group is drawn, ``(groups, resamples)``.
        """
        won_twice = (self._positives @ draws) * (self._losses @ draws).cumsum(axis=0)
        negatives, positives = self._classes @ draws
        with np.errstate(invalid="ignore"):
            found: Float64Array = won_twice.sum(axis=0) / (2 * positives * negatives)
        return found


@dataclass(frozen=True)
class Resampled:
    """AUCs of runs on resampled test rows.

    Args:
        aucs: AUC of each resample, ``(resamples,)``, by run and task.
        rows: Checksum of the labels and groups of each run; runs with the same one were tested on
            the same rows.
        groups: Number of groups, or of rows if the data has none, by that checksum.
    """

    aucs: Mapping[tuple[str, str], Float64Array]
    rows: Mapping[str, str]
    groups: Mapping[str, int]

    def shared_groups(self, runs: Iterable[str], task: str) -> int:
        """Return the number of groups of runs that were tested on the same rows, otherwise 0."""
        found = {self.rows[run] if (run, task) in self.aucs else "" for run in runs}
        return self.groups.get(found.pop(), 0) if len(found) == 1 else 0

    def of_runs(self, runs: Iterable[str], task: str) -> Float64Array:
        """Return the AUCs of several runs, ``(runs, resamples)``."""
        return np.stack([self.aucs[run, task] for run in runs])


def resample_runs(
    runs: Runs,
    *,
    split: str = "test",
    resamples: int = 1000,
    track: Callable[[Sequence[Run]], Iterable[Run]] = iter,
) -> Resampled:
    """Resample the test rows of every run that kept its scores.

    Memory is that of one run's scores and of a few resamples.

    Args:
        runs: Finished runs.
        split: Test set.
        resamples: Number of resamples; with 0 no file is read.
        track: Iterates over the runs, for example behind a progress bar.

    Raises:
        InputError: If a file of scores is missing or damaged.
    """
    aucs: dict[tuple[str, str], Float64Array] = {}
    rows: dict[str, str] = {}
    groups: dict[str, int] = {}
    kept_runs = [run for run in runs if resamples and split in run.record.scores]
    for run in track(kept_runs):
        kept = read_scores(run.folder, split, run.record.scores[split])
        rows[run.name] = checksum = _checksum(kept)
        of_run = resample_aucs(kept, resamples)
        aucs |= {(run.name, task): values for task, values in of_run.items()}
        if checksum not in groups:
            groups[checksum] = len(_numbers(kept)[1])
    return Resampled(aucs, rows, groups)


def resample_aucs(kept: Scores, resamples: int, seed: int = _SEED) -> dict[str, Float64Array]:
    """Return the AUC of each task on each resample, ``(resamples,)``.

    Groups are drawn out of those of all rows, so that a task that is measured on some of them sees
    the same draws.
    """
    numbers, ids = _numbers(kept)
    tasks = {}
    for task, scores in kept.scores.items():
        measured = ~np.isnan(scores)
        labels = kept.labels[task][measured]
        tasks[task] = GroupedAuc(scores[measured], labels, numbers[measured], len(ids))
    size = max(len(ids), *(auc.distinct for auc in tasks.values()))
    chunks = draw_groups(len(ids), resamples, seed, chunk=max(1, _NUMBERS // size))
    found = [[auc(draws) for auc in tasks.values()] for draws in chunks]
    return dict(zip(tasks, np.concatenate(found, axis=1), strict=True))


def draw_groups(count: int, resamples: int, seed: int, *, chunk: int) -> Iterator[Float64Array]:
    """Yield how often each group is drawn, ``(groups, up to chunk resamples)``.

    The draws do not depend on ``chunk``.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, chunk):
        draws = np.empty((min(chunk, resamples - start), count))
        for resample in draws:
            resample[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        yield np.ascontiguousarray(draws.T)


def _counts(rows: Int64Array, columns: Int64Array, shape: tuple[int, int]) -> Any:
    """Return the sparse matrix of the number of times that a row and a column occur together."""
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def _numbers(kept: Scores) -> tuple[Int64Array, Int64Array]:
    """Return the number of each row's group, and the groups; each row is one without groups."""
    if kept.groups is None:
        rows = np.arange(len(next(iter(kept.scores.values()))))
        return rows, rows
    ids, numbers = np.unique(kept.groups, return_inverse=True)
    return numbers, ids


def _checksum(kept: Scores) -> str:
    found = hashlib.sha256()
    for task, scores in kept.scores.items():
        found.update(task.encode())
        found.update(np.packbits(kept.labels[task]).tobytes())
        found.update(np.packbits(np.isnan(scores)).tobytes())
    if kept.groups is not None:
        found.update(kept.groups.tobytes())
    return found.hexdigest()
