"""Noise of features, some of which get another valid value (paper, section 3.1), and of labels.

A hash decides, so that no draw depends on another and nothing is stored: a row of a prepared file
has the same noise in every batch, epoch, process, run and model, in training and in validation. The
hash is SplitMix64 (Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, 2014,
with Stafford's mixer 13) as a tree of generators. The seed and the file give a state whose output
number ``row`` is the state of the row. Output 0 of the row's state decides whether the row is
noisy. Output ``1 + column`` decides whether the feature is replaced, and is the state from which
the new value is drawn (for a bag, its output ``position`` is the state from which that token is
drawn). Columns are numbered in the order categorical fields, multi-valued fields, numerical
features. Labels have a tree of their own, whose output ``label`` of a row's state decides whether
the label is flipped, so that label noise does not depend on the features or on their noise.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.arrays import BoolArray, Int64Array, IntArray, UInt8Array, UIntArray
from mtnrec.batch import Bags, Batch
from mtnrec.checks import InputError, check_choice, check_integer, check_number, format_names
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.store import Arrays
from mtnrec.schema import CategoricalField, Schema

_FILES = {"train": 0, "val": 0, "test": 1}  # the validation rows are rows of the training file
_SAMPLED_ROWS = 1 << 16
_LISTED_TICKETS = 1 << 23  # 32 MiB; beyond, holders are found by a slower search
_ROWS_PER_HASH = 1 << 14  # a chunk's hashes stay in the processor's cache
_ROWS_PER_COUNT = 1 << 17
_BAGS_PER_COUNT = 1 << 12

Values = npt.NDArray[Any]


def splitmix64(states: UIntArray, numbers: Int64Array) -> UIntArray:
    """Return outputs of SplitMix64 generators, 64 bits each; the arguments broadcast.

    Args:
        states: The generators' seeds.
        numbers: Which output of each, counted from 0.
    """
    bits = states + (numbers.astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
    bits ^= bits >> 30
    bits *= 0xBF58476D1CE4E5B9
    bits ^= bits >> 27
    bits *= 0x94D049BB133111EB
    bits ^= bits >> 31
    return bits


def is_below(bits: UIntArray, share: float) -> BoolArray:
    """Return whether ``bits`` are in the lowest ``share`` of their range: none for 0, all for 1."""
    return bits >> 1 < round(share * 2**63)  # 2**64 would not fit


def scale(bits: UIntArray, limits: Int64Array) -> Int64Array:
    """Map bits evenly to ``0 … limit - 1``.

    The probability of an integer is ``1 / limit`` to within ``2**-53``.
    """
    return ((bits >> 11) * 2.0**-53 * limits).astype(np.int64)


@dataclass(kw_only=True, eq=False, repr=False)
class Noise:
    """Replaces features of a batch with other valid values of their columns, and flips labels.

    A bag is one feature: all its tokens are replaced, and its length and weights stay. A feature
    without another value and an empty bag are unchanged; a missing value may become any valid one.

    Label noise turns positives into negatives (1 to 0, an event that was not logged), in every row,
    whether its features are noisy or not. On a funnel an event that is lost takes the later ones
    along: a row whose click is flipped has no conversion either, so a flip probability ``a`` of the
    click and ``b`` of the conversion leaves ``(1 - a) * (1 - b)`` of the conversions.

    Args:
        proportion: Share of noisy rows, in [0, 1]. Rows that are noisy at a smaller proportion are
            noisy at a larger one too.
        feature_probability: Probability that a feature of a noisy row is replaced, in [0, 1].
        sampling: ``uniform`` over the other values of the vocabulary, or ``empirical``, by their
            counts in the training file. A numerical feature's values are the distinct ones among at
            most 65,536 evenly spaced training rows, which bounds the time and memory of the set-up.
        label_flip: Probability that a positive label becomes negative, in [0, 1], by label; None
            flips none. Labels that are flipped at a smaller probability are at a larger one too.
        splits: Which of train, val and test have noisy rows and labels.
        seed: Seed of the noise.
    """

    proportion: float = 0.0
    feature_probability: float = 0.2
    sampling: str = "uniform"
    label_flip: Mapping[str, float] | None = None
    splits: list[str] = field(default_factory=lambda: ["train", "val"])
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("noise.proportion", self.proportion, minimum=0, maximum=1)
        check_number("noise.feature_probability", self.feature_probability, minimum=0, maximum=1)
        check_choice("noise.sampling", self.sampling, ["uniform", "empirical"])
        flips: Any = {} if self.label_flip is None else self.label_flip
        if not isinstance(flips, Mapping):
            raise InputError(
                "noise.label_flip must have a probability by label, got "
                f"{flips!r}. Set for example noise.label_flip={{conversion:0.1}}."
            )
        for label, probability in flips.items():
            check_number(f"noise.label_flip.{label}", probability, minimum=0, maximum=1)
        self._flip_probabilities = dict(flips)
        splits: Any = self.splits
        if not isinstance(splits, list | tuple) or not splits:
            raise InputError(
                f"noise.splits must be a list of at least one of {', '.join(_FILES)}, got "
                f"{splits!r}. Set noise.proportion=0 to switch the noise off."
            )
        for split in splits:
            check_choice("noise.splits", split, list(_FILES))
        check_integer("noise.seed", self.seed, minimum=0)
        self._files = self._file_states()
        self._label_files = self._file_states(1)
        self._schema: Schema | None = None

    def _file_states(self, *tree: int) -> list[UIntArray]:
        """Return the state of each file in a tree of generators."""
        keys = [(file, *tree) for file in sorted(set(_FILES.values()))]
        seeds = [np.random.SeedSequence(self.seed, spawn_key=key) for key in keys]
        return [seed.generate_state(1, np.uint64) for seed in seeds]

    @property
    def flips_labels(self) -> bool:
        """Whether any label may be flipped."""
        return any(self._flip_probabilities.values())

    def learn(self, schema: Schema, arrays: Arrays) -> None:
        """Collect the values that may replace others.

        Args:
            schema: The fields and labels.
            arrays: The training file. Uniform sampling reads the sampled rows' numerical features,
                empirical sampling also all categorical values and tokens.

        Raises:
            InputError: If ``label_flip`` names a label that the data lack.
        """
        if unknown := [label for label in self._flip_probabilities if label not in schema.labels]:
            raise InputError(
                f"noise.label_flip must name labels of the data ({', '.join(schema.labels)}), got "
                f"{format_names([str(label) for label in unknown])}"
            )
        self._schema = schema
        if not self.proportion:
            return
        counts = token_counts = None
        if self.sampling == "empirical":
            counts = _count(schema.categorical, arrays["categorical"])
            token_counts = [
                _count_tokens(field, arrays, column)
                for column, field in enumerate(schema.multivalued)
            ]
        self._categorical = _Alternatives(_valid(schema.categorical), counts)
        self._tokens = _Alternatives(_valid(schema.multivalued), token_counts)
        self._numerical = _Alternatives(
            *_observed(arrays["numerical"], counted=self.sampling == "empirical")
        )

    def masks(self, split: str, rows: Int64Array) -> tuple[Int64Array, BoolArray]:
        """Return which rows are noisy and which of their features are replaced.

        Args:
            split: ``train``, ``val`` or ``test``.
            rows: Row numbers in the prepared file, ``(rows,)``.

        Returns:
            Positions in ``rows`` of the noisy rows, ``(noisy,)``, and a mask of their replaced
            features, ``(noisy, F + M + N)``.
        """
        noisy, bits = self._hash(split, rows)
        return noisy, is_below(bits, self.feature_probability)

    def apply(self, split: str, rows: Int64Array, batch: Batch) -> None:
        """Replace features and flip labels of a batch, in place.

        Args:
            split: ``train``, ``val`` or ``test``.
            rows: Row numbers in the prepared file, ``(B,)``.
            batch: The ``B`` rows.
        """
        noisy, bits = self._hash(split, rows)
        if batch.labels is not None:
            self.flip_labels(split, rows, batch.labels.numpy())
        if not len(noisy):
            return
        replaced = is_below(bits, self.feature_probability)
        fields, bags = batch.categorical.shape[1], len(batch.bags)
        for tensor, alternatives, columns in (
            (batch.categorical, self._categorical, slice(fields)),
            (batch.numerical, self._numerical, slice(fields + bags, None)),
        ):
            row, column = _nonzero(replaced[:, columns])
            values, features = tensor.numpy(), (noisy[row], column)
            states = bits[:, columns][row, column]
            values[features] = alternatives.draw(column, values[features], states)
        for bag in range(bags):
            has_noise = replaced[:, fields + bag]
            states = bits[has_noise, fields + bag]
            self._replace_tokens(batch.bags[bag], bag, noisy[has_noise], states)

    def flip_labels(self, split: str, rows: IntArray, labels: Values) -> None:
        """Flip labels of some rows, in place.

        Args:
            split: ``train``, ``val`` or ``test``.
            rows: Row numbers in the prepared file, ``(n,)``.
            labels: Their labels, 0 or 1, ``(n, T)``.
        """
        if not self.flips_labels or split not in self.splits:
            return
        for start in range(0, len(rows), _ROWS_PER_HASH):
            piece = slice(start, start + _ROWS_PER_HASH)
            labels[piece][self._flips(split, rows[piece])] = 0

    def record(
        self, rows: Mapping[str, IntArray], labels: Mapping[str, UInt8Array] | None = None
    ) -> dict[str, Any]:
        """Return the settings and their effect on a data set; this hashes each noisy feature.

        Args:
            rows: Row numbers of each split in the prepared file.
            labels: Labels of each noisy split as prepared, ``(rows, T)``; needed by label noise
                only.

        Returns:
            The settings; of each noisy split the ``noisy_rows``, ``replaced_features`` and, by
            label, ``flipped_labels``; and the ``checksum``: SHA-256 over the name of each split
            and, for each of its noisy rows, the row number (int64, little-endian) and the bits of
            its replaced features, then likewise of the rows with flipped labels, if labels are
            flipped. It is None without noise.
        """
        splits = [split for split in _FILES if split in self.splits and split in rows]
        noisy_rows, replaced_features = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
        digest = hashlib.sha256()
        for split in splits if self.proportion else []:
            digest.update(split.encode())
            for chunk in _chunks(rows[split], _ROWS_PER_HASH):
                noisy, replaced = self.masks(split, chunk)
                noisy_rows[split] += len(noisy)
                replaced_features[split] += int(np.count_nonzero(replaced))
                numbers = chunk[noisy].astype("<i8")[:, None].view(np.uint8)
                digest.update(np.hstack([numbers, np.packbits(replaced, axis=1)]).tobytes())
        flipped_labels: dict[str, dict[str, int]] = {}
        for split in splits if self.flips_labels else []:
            assert self._schema is not None
            assert labels is not None
            digest.update(split.encode())
            counts = np.zeros(len(self._schema.labels), np.int64)
            for start in range(0, len(rows[split]), _ROWS_PER_HASH):
                chunk = rows[split][start : start + _ROWS_PER_HASH]
                positive = labels[split][start : start + _ROWS_PER_HASH] == 1
                flipped = self._flips(split, chunk) & positive
                counts += np.count_nonzero(flipped, axis=0)
                any_flipped = flipped.any(axis=1)
                numbers = chunk[any_flipped].astype("<i8")[:, None].view(np.uint8)
                bits = np.packbits(flipped[any_flipped], axis=1)
                digest.update(np.hstack([numbers, bits]).tobytes())
            flipped_labels[split] = dict(zip(self._schema.labels, counts.tolist(), strict=True))
        return {
            **asdict(self),
            "noisy_rows": noisy_rows,
            "replaced_features": replaced_features,
            "flipped_labels": flipped_labels,
            "checksum": digest.hexdigest() if self.proportion or self.flips_labels else None,
        }

    def _flips(self, split: str, rows: IntArray) -> BoolArray:
        """Return which labels are 0 whatever they were, ``(n, T)``."""
        if self._schema is None:
            raise RuntimeError("call learn() first, or set the noise before DataModule.setup()")
        labels = self._schema.labels
        states = splitmix64(self._label_files[_FILES[split]], rows.astype(np.int64))
        bits = splitmix64(states[:, None], np.arange(len(labels)))
        flips = [
            is_below(bits[:, column], self._flip_probabilities.get(label, 0))
            for column, label in enumerate(labels)
        ]
        flipped = np.stack(flips, axis=1)
        return np.logical_or.accumulate(flipped, axis=1) if self._schema.funnel else flipped

    def _hash(self, split: str, rows: Int64Array) -> tuple[Int64Array, UIntArray]:
        """Return the noisy positions, and the bits that decide which of their features change."""
        if self._schema is None:
            raise RuntimeError("call learn() first, or set the noise before DataModule.setup()")
        schema = self._schema
        columns = len(schema.categorical) + len(schema.multivalued) + len(schema.numerical)
        if not self.proportion or split not in self.splits:
            return np.empty(0, np.int64), np.empty((0, columns), np.uint64)
        states = splitmix64(self._files[_FILES[split]], rows)
        decisions = splitmix64(states, np.zeros(1, np.int64))
        noisy = np.flatnonzero(is_below(decisions, self.proportion))
        return noisy, splitmix64(states[noisy, None], np.arange(1, 1 + columns))

    def _replace_tokens(self, bags: Bags, column: int, rows: Int64Array, states: UIntArray) -> None:
        tokens, offsets = bags.tokens.numpy(), bags.offsets.numpy()
        lengths = offsets[rows + 1] - offsets[rows]
        position = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        chosen = np.repeat(offsets[rows], lengths) + position
        states = splitmix64(np.repeat(states, lengths), position)
        columns = np.full(len(chosen), column)
        tokens[chosen] = self._tokens.draw(columns, tokens[chosen], states)


class _Alternatives:
    """Valid values of some columns, to draw from.

    A value holds one ticket, or as many as it has occurrences; tickets are numbered across all
    columns.

    Args:
        values: The distinct values of each column.
        counts: Occurrences of each value; None for one ticket each.
    """

    def __init__(self, values: list[Values], counts: list[Int64Array] | None) -> None:
        # The last value belongs to no column: a column without values draws it and discards it.
        extra = np.zeros(1, values[0].dtype if values else np.int32)
        self._values = np.concatenate([*values, extra])
        self._holders: Values | None = None  # value number of each ticket
        self._ends: Int64Array | None = None  # end of each value's tickets
        sizes = [len(column) for column in values]
        if counts is not None:
            sizes = [int(column.sum()) for column in counts]
            each = np.concatenate([*counts, np.ones(1, np.int64)])
            if sum(sizes) <= _LISTED_TICKETS:
                self._holders = np.repeat(np.arange(len(each), dtype=np.int32), each)
            self._ends = each.cumsum()
        self._tickets = np.array(sizes, np.int64)
        self._first = self._tickets.cumsum() - self._tickets

    def draw(self, columns: Int64Array, originals: Values, states: UIntArray) -> Values:
        """Draw another value for each original, which stays if there is no other.

        A draw that hits the original is repeated among the tickets of all other values, so that the
        probability of each other value is its share of those tickets.

        Args:
            columns: Column of each original, ``(n,)``.
            originals: Current values, ``(n,)``.
            states: Seeds of the draws, ``(n,)``.
        """
        tickets, first = self._tickets[columns], self._first[columns]
        drawn = first + scale(splitmix64(states, np.zeros(1, np.int64)), tickets)
        values = np.where(tickets > 0, self._value(drawn), originals)
        hit = np.flatnonzero(values == originals)
        start, end = self._span(drawn[hit])
        others = tickets[hit] - (end - start)
        hit, start, end, others = (array[others > 0] for array in (hit, start, end, others))
        again = first[hit] + scale(splitmix64(states[hit], np.ones(1, np.int64)), others)
        values[hit] = self._value(again + (end - start) * (again >= start))
        return values

    def _value(self, tickets: Int64Array) -> Values:
        """Return the value that holds each ticket."""
        return self._values[self._number(tickets)]

    def _number(self, tickets: Int64Array) -> Int64Array:
        """Return the number of the value that holds each ticket."""
        if self._ends is None:  # one ticket each
            return tickets
        if self._holders is None:
            return self._ends.searchsorted(tickets, side="right")
        return self._holders[tickets]

    def _span(self, tickets: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the start and end of the ticket range that contains each ticket."""
        numbers = self._number(tickets)
        if self._ends is None:
            return numbers, numbers + 1
        return np.where(numbers > 0, self._ends[numbers - 1], 0), self._ends[numbers]


def _nonzero(mask: BoolArray) -> tuple[Int64Array, Int64Array]:
    """Return ``mask.nonzero()`` of a two-dimensional mask, several times faster."""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column


def _valid(fields: tuple[CategoricalField, ...]) -> list[Values]:
    # Index 0, missing or unseen, is not a valid value.
    return [np.arange(1, field.vocabulary_size, dtype=np.int32) for field in fields]


def _count(fields: tuple[CategoricalField, ...], values: Values) -> list[Int64Array]:
    """Count the valid values of each column of ``(rows, F)``."""
    ends = np.cumsum([0, *(field.vocabulary_size for field in fields)])
    counts = np.zeros(ends[-1], np.int64)
    for chunk in _chunks(values, _ROWS_PER_COUNT):
        counts += np.bincount((chunk + ends[:-1]).ravel(), minlength=len(counts))
    return [counts[start + 1 : end] for start, end in pairwise(ends)]


def _count_tokens(field: CategoricalField, arrays: Arrays, column: int) -> Int64Array:
    """Count the valid tokens of a multi-valued field, a bag once per row that has it."""
    offsets, tokens = (arrays[bag_stem(field.name, part)] for part in ("offsets", "tokens"))
    rows = np.zeros(len(offsets) - 1, np.int64)
    for chunk in _chunks(arrays["bag"][:, column], _ROWS_PER_COUNT):
        rows += np.bincount(chunk, minlength=len(rows))
    counts = np.zeros(field.vocabulary_size)
    for start in range(0, len(rows), _BAGS_PER_COUNT):
        ends = offsets[start : start + _BAGS_PER_COUNT + 1]
        weights = np.repeat(rows[start : start + _BAGS_PER_COUNT], np.diff(ends))
        chunk = tokens[ends[0] : ends[-1]]
        counts += np.bincount(chunk, weights, minlength=len(counts))
    return counts[1:].astype(np.int64)


def _observed(numerical: Values, *, counted: bool) -> tuple[list[Values], list[Int64Array] | None]:
    """Return the distinct values of evenly spaced rows, and how often each occurs there."""
    rows = np.linspace(0, len(numerical) - 1, min(len(numerical), _SAMPLED_ROWS)).astype(np.int64)
    found = [np.unique(column, return_counts=True) for column in numerical[rows].T]
    return [values for values, _ in found], [counts for _, counts in found] if counted else None


def _chunks(array: Values, rows: int) -> Iterator[Values]:
    for start in range(0, len(array), rows):
        yield array[start : start + rows]
