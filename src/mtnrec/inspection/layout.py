"""Text report on a prepared data set."""

import io
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.inspection.leaks import FEWEST, THRESHOLD, LeakCheck
from mtnrec.inspection.statistics import SLICES, Changes, SplitStatistics
from mtnrec.schema import Schema

_WIDTH = 80
_STRONGEST = 3  # features shown per task, even if none is suspected
_NOTHING = "-"

Statistics = Mapping[str, SplitStatistics]


class _Part(NamedTuple):
    """A table of the report, with a title above it and notes below it."""

    title: str
    table: Table
    notes: tuple[str, ...] = ()


def check_destination(out: Path, directory: Path) -> None:
    """Refuse a report path that is a folder or lies inside the prepared data set.

    Args:
        out: Path of the report.
        directory: Folder of the prepared data set.
    """
    if out.is_dir():
        raise InputError(f"out must be a file, got the folder {out}. Choose another path.")
    if out.resolve().is_relative_to(directory.resolve()):
        raise InputError(
            "out must lie outside the prepared data set, which holds no other files, got "
            f"{out}. Choose a file elsewhere."
        )


def render_summary(
    directory: Path,
    manifest: Manifest,
    statistics: Statistics,
    leaks: LeakCheck,
    changes: Mapping[str, Changes],
) -> str:
    """Return the report in lines of at most 80 characters, unless names are long.

    Args:
        directory: Folder of the prepared data set.
        manifest: Manifest of the data set.
        statistics: Statistics of each split.
        leaks: AUC of each feature alone.
        changes: Changes that noise makes, by noisy split.
    """
    schema = manifest.schema
    # The manifest sorts the splits by name.
    statistics = {s: statistics[s] for s in sorted(statistics, key=lambda s: (s != "train", s))}
    parts = [
        *_labels(schema, statistics),
        *_truth(schema, statistics),
        *_fields(manifest, statistics),
        _alone(schema, leaks),
        *([_noise(changes)] if changes else []),
    ]
    buffer = io.StringIO()
    console = Console(file=buffer, width=_WIDTH, markup=False, highlight=False)
    anything = console.options.update(max_width=1 << 16)
    widths = [Measurement.get(console, anything, part.table).maximum for part in parts]
    console.width = max(_WIDTH, *widths)
    for line in _origin(directory, manifest):
        console.print(line, soft_wrap=True)
    for part in parts:
        console.print("", part.title, "", sep="\n")
        console.print(part.table)
        for note in part.notes:
            console.print(note, soft_wrap=True)
    lines = buffer.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _origin(directory: Path, manifest: Manifest) -> Iterator[str]:
    yield f"{manifest.source}, prepared in {directory}"
    yield f"checksum {manifest.checksum}"
    settings = (f"{key}={json.dumps(value)}" for key, value in manifest.parameters.items())
    if text := ", ".join(settings):
        yield textwrap.fill(f"prepared with {text}", _WIDTH, break_long_words=False)
    for what, count in manifest.report.items():
        yield f"{what.replace('_', ' ')}: {count:,}"


def _table(*headers: str, names: int = 1) -> Table:
    """Return an empty table; its first ``names`` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column < names else "right", no_wrap=True)
    return table


def _share(part: float, whole: float) -> str:
    if not whole:
        return _NOTHING
    share = part / whole
    return "0" if not part else f"{share:.2%}" if share >= 1e-4 else "<0.01%"


def _labels(schema: Schema, statistics: Statistics) -> Iterator[_Part]:
    rates = _table("split", "task", "definition", "rows", "positives", "rate", names=3)
    drift = _table("split", "task", *(str(number + 1) for number in range(SLICES)), names=2)
    for split, found in statistics.items():
        for column, task in enumerate(schema.tasks):
            name = schema.title(task)
            rows, positives = found.task_rows[:, column], found.task_positives[:, column]
            counts = f"{rows.sum():,}", f"{positives.sum():,}"
            rate = f"{positives.sum() / rows.sum():.3%}" if rows.any() else _NOTHING
            rates.add_row(split, name, schema.definition(task), *counts, rate)
            slices = zip(positives, rows, strict=True)
            percents = (f"{100 * part / all_:.3g}" if all_ else _NOTHING for part, all_ in slices)
            drift.add_row(split, name, *percents)
    yield _Part("Labels", rates)
    yield _Part("Drift: rate in % in each tenth of a split, in file order", drift)


def _truth(schema: Schema, statistics: Statistics) -> Iterator[_Part]:
    table = _table("label", "label", *statistics, names=2)
    known = [found.true_correlations for found in statistics.values()]
    for one, other in itertools.combinations(range(len(schema.labels)), 2):
        values = [_NOTHING if found is None else f"{found[one, other]:.3f}" for found in known]
        table.add_row(schema.labels[one], schema.labels[other], *values)
    if table.rows and any(found is not None for found in known):
        title = "Truth: correlation over rows of the labels' true logits"
        yield _Part(title, table, ("given the label before",) if schema.funnel else ())


def _fields(manifest: Manifest, statistics: Statistics) -> Iterator[_Part]:
    if manifest.schema.categorical:
        yield _categorical(manifest, statistics)
    if manifest.schema.multivalued:
        yield _multivalued(manifest.schema, statistics)
    if manifest.schema.numerical:
        yield _numerical(manifest, statistics)
    if manifest.transforms:
        yield _transforms(manifest)


def _headers(statistics: Statistics, *kinds: str) -> list[str]:
    return [f"{split}\n{kind}" for split in statistics for kind in kinds]


def _categorical(manifest: Manifest, statistics: Statistics) -> _Part:
    table = _table("field", "vocabulary", *_headers(statistics, "missing", "others"))
    for column, field in enumerate(manifest.schema.categorical):
        shares = []
        for split, found in statistics.items():
            missing = manifest.missing[split].get(field.name, 0)
            shares.append(_share(missing, found.rows))
            shares.append(_share(found.zeros[column] - missing, found.rows))
        table.add_row(field.name, f"{field.vocabulary_size:,}", *shares)
    return _Part(
        "Categorical fields: share of rows with index 0",
        table,
        (
            "others: rare values, and values not in the training rows",
            "vocabulary: indices, including index 0",
        ),
    )


def _multivalued(schema: Schema, statistics: Statistics) -> _Part:
    kinds = ("empty", "tokens", "index 0")
    table = _table("field", "vocabulary", *_headers(statistics, *kinds))
    for column, field in enumerate(schema.multivalued):
        cells = []
        for found in statistics.values():
            tokens = found.tokens[column]
            cells.append(_share(found.empty_bags[column], found.rows))
            cells.append(f"{tokens / found.rows:.2f}" if found.rows else _NOTHING)
            cells.append(_share(found.zero_tokens[column], tokens))
        table.add_row(field.name, f"{field.vocabulary_size:,}", *cells)
    return _Part(
        "Multi-valued fields: empty rows, tokens per row, share of tokens with index 0",
        table,
        ("vocabulary: indices, including index 0 (rare values, values not in training)",),
    )


def _numerical(manifest: Manifest, statistics: Statistics) -> _Part:
    table = _table("feature", *_headers(statistics, "missing", "min", "mean", "max"))
    for column, name in enumerate(manifest.schema.numerical):
        cells = []
        for split, found in statistics.items():
            cells.append(_share(manifest.missing[split].get(name, 0), found.rows))
            values = (found.minimum[column], found.mean[column], found.maximum[column])
            cells += [f"{value:.4g}" if found.rows else _NOTHING for value in values]
        table.add_row(name, *cells)
    return _Part("Numerical features, as stored", table)


def _transforms(manifest: Manifest) -> _Part:
    table = _table("feature", "fill", "shift", "scale")
    for name, transform in manifest.transforms.items():
        cells = (transform.get(key) for key in ("fill", "shift", "scale"))
        table.add_row(name, *(_NOTHING if cell is None else f"{cell:.6g}" for cell in cells))
    title = "Transforms: missing values become fill, then (value - shift) / scale is stored"
    return _Part(title, table)


def _alone(schema: Schema, leaks: LeakCheck) -> _Part:
    table = _table("label", "feature", "AUC", names=2)
    for task in schema.tasks:
        found = leaks.aucs[task.name]
        if found is None:
            table.add_row(schema.definition(task), f"not judged: a class has under {FEWEST} rows")
            continue
        suspected = sum(value > THRESHOLD for value in found.values())
        strongest = sorted(found, key=found.__getitem__, reverse=True)
        for feature in strongest[: max(_STRONGEST, suspected)]:
            table.add_row(schema.definition(task), feature, f"{found[feature]:.4f}")
    findings = tuple(f"Suspected leak: {leak}" for leak in leaks.leaks)
    note = f"learnt on one half of {leaks.rows:,} training rows, measured on the other"
    nothing = (f"No judged feature alone has an AUC above {THRESHOLD}.",)
    return _Part("AUC of each feature alone", table, (note, *(findings or nothing)))


def _noise(changes: Mapping[str, Changes]) -> _Part:
    table = _table("", *changes)
    table.add_row("rows", *(_share(change.noisy_rows, change.rows) for change in changes.values()))
    for feature in next(iter(changes.values())).features:
        shares = [_share(change.features[feature], change.rows) for change in changes.values()]
        table.add_row(feature, *shares)
    for label in next(iter(changes.values())).labels:
        counts = [change.labels[label] for change in changes.values()]
        if any(counts):
            shares = [_share(n, c.rows) for n, c in zip(counts, changes.values(), strict=True)]
            table.add_row(f"label {label}", *shares)
    compared = ", ".join(f"{change.rows:,} rows of {split}" for split, change in changes.items())
    note = f"counted on {compared}; a feature with a single value does not change"
    return _Part("Noise: share of rows, and of each feature's values, that change", table, (note,))
