"""A click log with known probabilities, drawn from a planted low-rank funnel.

Each categorical value and each numerical feature has a vector in ``R^K`` (``K`` is ``rank``). The
vectors of a user add up to ``u``, those of an item to ``v``, and the labels depend only on
``h = (u + v, u * v)``::

    P(click)               = sigmoid(b_1 + c_1 <w_1, h>)
    P(conversion | click)  = sigmoid(b_2 + c_2 <w_2, h>)

``w_1`` and ``w_2`` are unit vectors with inner product ``task_correlation`` and squared length
``interaction`` on ``u * v``; ``c`` is the standard deviation of the logits, and ``b`` is fitted to
the rates. Later stages are drawn like the conversion, given the label before. All probabilities are
stored with the labels, so that the AUC of the best possible scores (the Bayes AUC) is known for
each task.

With ``hidden_units`` the labels read ``h`` through hidden layers of ReLU units::

    P(click)               = sigmoid(b_1 + c_1 f_1)
    P(conversion | click)  = sigmoid(b_2 + c_2 (r q f_1 + r sqrt(1 - q^2) f_2 + sqrt(1 - r^2) g))

``f_1`` and ``f_2`` are two heads of one layer, ``g`` is the head of another; over rows they have
variance 1 and do not correlate. ``r`` is ``relatedness`` and ``q`` is ``task_correlation``:
the true logits of click and conversion correlate at ``r q``, at ``r = q = 1`` they are one function
up to scale, and at ``r = 0`` their hidden layers are independent. The clicks depend on neither.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mtnrec.arrays import Float64Array, Int64Array
from mtnrec.checks import InputError, check_integer, check_number
from mtnrec.data.datamodule import SelfPreparing
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.schema import Schema

_SEARCHES_PER_CHUNK = 8192
_CALIBRATION_CHUNK = 2**32 - 1  # a chunk number that no log reaches
_SPLITS = ("train", "test")
_UNSCALED_SIZE = 100
_MOST_UNITS = 256  # the outputs of a layer on the calibration sample take 170 MB
_FEWEST_UNITS = 3  # a head that does not correlate with two others
_LEAST_VARIANCE = 1e-6  # of a head, as a share of the units' variances
_VOCABULARY_SIZES = (1, 4, 7, 2, 21, 7, 50, 8, 7, 2, 2, 2, 2, 2, 2, 2)  # as in AliExpress
_INTEGER_COLUMNS = 3  # as in AliExpress: three of the numerical features are counts

_RATES = ("test_share", "click_rate", "conversion_rate")
_OPTIONAL = ("later_stages", "hidden_units", "relatedness")  # parameters of some logs
_SMALLEST = {
    "rows": 1,
    "rows_per_search": 1,
    "rank": 2,
    "user_fields": 0,
    "user_numerical_features": 0,
    "numerical_features": 0,
    "generator_seed": 0,
}


@dataclass(kw_only=True, eq=False, repr=False)
class Synthetic(SelfPreparing):
    """Synthetic funnel log that prepares itself if its folder is missing.

    Rows come in searches: the rows of one search share their user fields. The last searches are
    the test split.

    Args:
        rows: Rows of the log, test rows included.
        rows_per_search: Rows per search; they share a user.
        test_share: Share of the searches in the test split, in (0, 1).
        vocabulary_sizes: Number of values of each categorical field, user fields first.
        vocabulary_scale: Factor in (0, 1] on sizes above 100, which stay at least 100.
        user_fields: Number of categorical fields that describe the user.
        numerical_features: Number of numerical features, user features first.
        user_numerical_features: Number of numerical features that describe the user.
        skew: Value ``k`` of a field has a probability proportional to ``(k + 1) ** -skew``.
        rank: ``K``, the dimension of the planted vectors.
        click_rate: Mean of P(click), in (0, 1).
        conversion_rate: Mean of P(conversion | click) over clicks, in (0, 1).
        click_spread: Standard deviation of the click logits.
        conversion_spread: Standard deviation of the logits of the conversion and later stages.
        task_correlation: Inner product of the two task vectors, in [0, 1]; with hidden layers, the
            correlation of what the labels read from the click's layer.
        interaction: Share of the logit variance that comes from products of user and item.
        generator_seed: Seed of the log, independent of the training seed.
        later_stages: Further labels of the funnel: mean of P(label | label before) by name, in
            order, for example ``{buy: 0.3}`` after click and conversion; None for none.
        hidden_units: Units of each hidden layer, from 3 to 256; 0 for logits that are linear in
            ``h``.
        relatedness: How much of a later label's logits comes from the click's hidden layer, in
            [0, 1]: 1 for all, 0 for nothing but a layer of its own. Needs ``hidden_units``.
    """

    name: str = "synthetic"
    rows: int = 200_000
    rows_per_search: int = 10
    test_share: float = 0.2
    vocabulary_sizes: list[int] = field(default_factory=lambda: list(_VOCABULARY_SIZES))
    vocabulary_scale: float = 1.0
    user_fields: int = 9
    numerical_features: int = 63
    user_numerical_features: int = 23
    skew: float = 1.0
    rank: int = 4
    click_rate: float = 0.05
    conversion_rate: float = 0.1
    click_spread: float = 1.2
    conversion_spread: float = 1.5
    task_correlation: float = 0.5
    interaction: float = 0.2
    generator_seed: int = 0
    later_stages: dict[str, float] | None = None
    hidden_units: int = 0
    relatedness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in _SMALLEST.items():
            check_integer(f"data.{name}", getattr(self, name), minimum=minimum)
        sizes: Any = self.vocabulary_sizes
        if not isinstance(sizes, list | tuple):
            raise InputError(f"data.vocabulary_sizes must be a list of sizes, got {sizes!r}")
        for size in sizes:
            check_integer("data.vocabulary_sizes", size, minimum=1)
        for name in ("skew", "click_spread", "conversion_spread"):
            check_number(f"data.{name}", getattr(self, name), minimum=0)
        rates = {name: getattr(self, name) for name in _RATES}
        rates |= {f"later_stages.{name}": rate for name, rate in self._later.items()}
        for name, rate in rates.items():
            check_number(f"data.{name}", rate, minimum=1e-9, maximum=1, open_maximum=True)
        check_number("data.vocabulary_scale", self.vocabulary_scale, minimum=1e-9, maximum=1)
        for name in ("task_correlation", "interaction", "relatedness"):
            check_number(f"data.{name}", getattr(self, name), minimum=0, maximum=1)
        self._check_hidden_layers()
        if (
            self.user_fields > len(self.vocabulary_sizes)
            or self.user_numerical_features > self.numerical_features
        ):
            raise InputError(
                "data.user_fields and data.user_numerical_features must not exceed the number of "
                f"fields and features, got {self.user_fields} of {len(self.vocabulary_sizes)} and "
                f"{self.user_numerical_features} of {self.numerical_features}"
            )
        self.vocabulary_sizes = list(self.vocabulary_sizes)
        self.sizes = [
            min(size, max(_UNSCALED_SIZE, int(np.ceil(size * self.vocabulary_scale))))
            for size in self.vocabulary_sizes
        ]

    def _check_hidden_layers(self) -> None:
        check_integer("data.hidden_units", self.hidden_units, minimum=0, maximum=_MOST_UNITS)
        remedy = "Set data.hidden_units=32."
        if 0 < self.hidden_units < _FEWEST_UNITS:
            raise InputError(
                f"data.hidden_units must be 0 or at least {_FEWEST_UNITS}, got "
                f"{self.hidden_units}. {remedy}"
            )
        if not self.hidden_units and self.relatedness != 1:
            raise InputError(
                f"data.relatedness must be 1 without hidden layers, got {self.relatedness:g}. "
                f"{remedy}"
            )

    @property
    def _later(self) -> dict[str, float]:
        return self.later_stages or {}

    @property
    def stage_rates(self) -> list[float]:
        """Mean of P(label | label before) of each stage."""
        return [self.click_rate, self.conversion_rate, *self._later.values()]

    @property
    def _folder_name(self) -> str:
        return f"{self.name}-{self.rows}-{self.generator_seed}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the log."""
        keys = [key for key in Synthetic.__annotations__ if key != "name"]
        found = {key: getattr(self, key) for key in keys}
        # Logs without them are those of before the keys existed.
        if not self._later:
            del found["later_stages"]
        if not self.hidden_units:
            del found["hidden_units"], found["relatedness"]
        return found

    def _find_differing(self, found: dict[str, Any]) -> dict[str, Any]:
        here = self.parameters
        only_there = {key: getattr(self, key) for key in _OPTIONAL if key in found.keys() - here}
        return super()._find_differing(found) | only_there

    def prepare(self) -> Manifest:
        """Generate the log and write it as a prepared data set."""
        # Imported here: training needs no polars, whose import takes 0.1 s.
        from mtnrec.data.prepared.vocabulary import ValueCounts, encode_in_place

        searches = -(-self.rows // self.rows_per_search)
        test_from = self.rows_per_search * round(searches * (1 - self.test_share))
        counts = [ValueCounts() for _ in self.sizes]
        with write_prepared(self.folder, _SPLITS) as writer:
            for chunk, first in enumerate(range(0, searches, _SEARCHES_PER_CHUNK)):
                last = min(first + _SEARCHES_PER_CHUNK, searches)
                rows = min(last * self.rows_per_search, self.rows) - first * self.rows_per_search
                arrays = self._draw(chunk, last - first)
                arrays["group"] += first
                train = int(np.clip(test_from - first * self.rows_per_search, 0, rows))
                for column, values in enumerate(counts):
                    values.update(arrays["categorical"][:train, column])
                for split, part in zip(_SPLITS, (slice(train), slice(train, rows)), strict=True):
                    writer.append(split, {stem: array[part] for stem, array in arrays.items()})
            names = tuple(f"categorical_{i + 1}" for i in range(len(self.sizes)))
            vocabularies = [values.vocabulary() for values in counts]
            fields = encode_in_place(writer, _SPLITS, names, vocabularies)
            numerical = tuple(f"numerical_{i + 1}" for i in range(self.numerical_features))
            labels = ("click", "conversion", *self._later)
            schema = Schema(fields, numerical, labels, funnel=True)
            return writer.finish(
                source=self.name, parameters=self.parameters, schema=schema, report={}
            )

    def _draw(self, chunk: int, searches: int) -> Arrays:
        rng = np.random.default_rng([self.generator_seed, 1, chunk])
        categorical, numerical, group = self.draw_features(rng, searches)
        given = _sigmoid(self.logits(categorical, numerical))
        reached = np.ones(len(group), np.bool_)
        labels = []
        for probability in given:
            reached = reached & (rng.random(len(group)) < probability)
            labels.append(reached)
        return {
            "categorical": categorical.astype(np.int32),
            "numerical": numerical.astype(np.float32),
            "labels": np.stack(labels, axis=1),
            "group": group,
            "probabilities": np.ascontiguousarray(given.cumprod(axis=0).T),
        }

    def draw_features(
        self, rng: np.random.Generator, searches: int
    ) -> tuple[Int64Array, Float64Array, Int64Array]:
        """Draw ``(rows, F)`` raw values, ``(rows, N)`` features and ``(rows,)`` search numbers."""
        group = np.repeat(np.arange(searches), self.rows_per_search)
        categorical = np.empty((len(group), len(self.sizes)), np.int64)
        for column, size in enumerate(self.sizes):
            weights = np.arange(1, size + 1) ** -float(self.skew)
            cumulative = np.cumsum(weights / weights.sum())
            is_user = column < self.user_fields
            draws = rng.random(searches if is_user else len(group))
            values = np.searchsorted(cumulative, draws).clip(max=size - 1)
            categorical[:, column] = values[group] if is_user else values
        numerical = np.empty((len(group), self.numerical_features))
        users = self.user_numerical_features
        numerical[:, :users] = _draw_numerical(rng, searches, users)[group]
        numerical[:, users:] = _draw_numerical(rng, len(group), self.numerical_features - users)
        if self.numerical_features - users > _INTEGER_COLUMNS:
            numerical[:, -_INTEGER_COLUMNS:] = rng.poisson(0.3, (len(group), _INTEGER_COLUMNS))
        return categorical, numerical, group

    def logits(self, categorical: Int64Array, numerical: Float64Array) -> Float64Array:
        """Return the true logits of each label given the one before it, ``(T, rows)``.

        Args:
            categorical: Raw values, as drawn by :meth:`draw_features`, ``(rows, F)``.
            numerical: Features, ``(rows, N)``.
        """
        return self._funnel.logits(categorical, numerical)

    @cached_property
    def _funnel(self) -> "_Funnel":
        return _Funnel(self)


class _Funnel:
    """Planted vectors, calibrated on a separate sample."""

    def __init__(self, log: Synthetic) -> None:
        rng = np.random.default_rng([log.generator_seed, 0])
        self._user_fields = log.user_fields
        self._user_numerical = log.user_numerical_features
        self._tables = [rng.standard_normal((size, log.rank)) for size in log.sizes]
        self._loadings = 2 * rng.standard_normal((log.numerical_features, log.rank))
        sums, products = (_task_vectors(rng, log.rank, log.task_correlation) for _ in range(2))
        # From streams of their own, so that the first two stages are those of a log without more.
        for stage in range(len(log.stage_rates) - 2):
            later = np.random.default_rng([log.generator_seed, 2, stage])
            sums, products = (
                np.column_stack([v, _related(later, v[:, 0], log.task_correlation)])
                for v in (sums, products)
            )
        self._tasks = np.concatenate(
            [np.sqrt(1 - log.interaction) * sums, np.sqrt(log.interaction) * products]
        )

        sample_rng = np.random.default_rng([log.generator_seed, 1, _CALIBRATION_CHUNK])
        categorical, numerical, _ = log.draw_features(sample_rng, _SEARCHES_PER_CHUNK)
        user, item = self._sides(categorical, numerical)
        self._user_mean, self._item_mean = user.mean(axis=0), item.mean(axis=0)
        latent = self._latent(categorical, numerical)
        self._latent_mean, self._latent_scale = latent.mean(axis=0), _positive(latent.std(axis=0))
        self._hidden: _HiddenLayers | None = None
        if log.hidden_units:
            self._hidden = _HiddenLayers(log, (latent - self._latent_mean) / self._latent_scale)
        scores = self._scores(categorical, numerical)
        spreads = [log.click_spread, *[log.conversion_spread] * (len(log.stage_rates) - 1)]
        self._slopes = spreads / _positive(scores.std(axis=0))
        self._biases = []
        reached = np.ones(len(scores))
        for slopes, rate in zip((scores * self._slopes).T, log.stage_rates, strict=True):
            self._biases.append(_fit_bias(slopes, reached, rate))
            reached = reached * _sigmoid(slopes + self._biases[-1])

    def logits(self, categorical: Int64Array, numerical: Float64Array) -> Float64Array:
        """Return the logits of each label given the one before it, ``(T, rows)``."""
        return (self._scores(categorical, numerical) * self._slopes + self._biases).T

    def _scores(self, categorical: Int64Array, numerical: Float64Array) -> Float64Array:
        latent = (self._latent(categorical, numerical) - self._latent_mean) / self._latent_scale
        return latent @ self._tasks if self._hidden is None else self._hidden.scores(latent)

    def _latent(self, categorical: Int64Array, numerical: Float64Array) -> Float64Array:
        user, item = self._sides(categorical, numerical)
        # Centred, so that their product is a pure interaction.
        product = (user - self._user_mean) * (item - self._item_mean)
        return np.concatenate([user + item, product], axis=1)

    def _sides(
        self, categorical: Int64Array, numerical: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        user = numerical[:, : self._user_numerical] @ self._loadings[: self._user_numerical]
        item = numerical[:, self._user_numerical :] @ self._loadings[self._user_numerical :]
        for column, table in enumerate(self._tables):
            side = user if column < self._user_fields else item
            side += table[categorical[:, column]]
        return user, item


class _HiddenLayers:
    """A hidden layer per label, of which later labels share the first, and the labels' scores.

    Args:
        log: Settings.
        latent: Standardised ``h`` of the calibration sample, ``(rows, 2 K)``.

    Raises:
        InputError: If the sample has too few different rows for uncorrelated heads.
    """

    def __init__(self, log: Synthetic, latent: Float64Array) -> None:
        units, r, q = log.hidden_units, log.relatedness, log.task_correlation
        labels = len(log.stage_rates)
        # A stream per label, so that the first labels are those of a log without later ones.
        streams = [np.random.default_rng([log.generator_seed, 3, label]) for label in range(labels)]
        sides = np.sqrt([1 - log.interaction, log.interaction])[:, None, None]
        self._weights, self._biases = [], []
        for stream in streams:
            halves = stream.standard_normal((2, log.rank, units))
            halves *= sides / np.linalg.norm(halves, axis=1, keepdims=True)
            self._weights.append(halves.reshape(-1, units))
            self._biases.append(stream.standard_normal(units))
        shared = _centred(self._layer(latent, 0))
        click = _head(streams[0], shared)
        self._heads = [(click, np.zeros(units))]  # on the click's layer and on the label's own
        for label, stream in enumerate(streams[1:], start=1):
            own = _centred(self._layer(latent, label))
            second = _head(stream, shared, shared @ click)
            third = _head(stream, own, shared @ click, shared @ second)
            of_shared = r * q * click + r * np.sqrt(1 - q**2) * second
            self._heads.append((of_shared, np.sqrt(1 - r**2) * third))

    def scores(self, latent: Float64Array) -> Float64Array:
        """Return the scores of the labels, of variance 1, ``(rows, T)``."""
        shared = self._layer(latent, 0)
        return np.column_stack(
            [
                shared @ of_shared + (self._layer(latent, label) @ of_own if of_own.any() else 0)
                for label, (of_shared, of_own) in enumerate(self._heads)
            ]
        )

    def _layer(self, latent: Float64Array, label: int) -> Float64Array:
        return np.maximum(latent @ self._weights[label] + self._biases[label], 0)


def _centred(outputs: Float64Array) -> Float64Array:
    return np.asarray(outputs - outputs.mean(axis=0))


def _head(rng: np.random.Generator, outputs: Float64Array, *others: Float64Array) -> Float64Array:
    """Draw a head of a layer whose values have variance 1 and do not correlate with others.

    Args:
        rng: Draws the head.
        outputs: Outputs of the layer, centred, ``(rows, H)``.
        others: Values of other heads, centred, ``(rows,)`` each.
    """
    head: Float64Array = rng.standard_normal((outputs.shape[1],))
    if others:
        apart, _ = np.linalg.qr(outputs.T @ np.column_stack(others))
        head = np.asarray(head - apart @ (apart.T @ head))
    variance = float((outputs @ head).var())
    if variance <= _LEAST_VARIANCE * outputs.var(axis=0).sum():
        raise InputError(
            "data.hidden_units must be 0 where the features have too few values for heads that do "
            f"not correlate, got {len(head)}. Add fields or features, or set data.hidden_units=0."
        )
    return np.asarray(head / np.sqrt(variance))


def _task_vectors(rng: np.random.Generator, rank: int, correlation: float) -> Float64Array:
    """Draw two unit vectors with inner product ``correlation``, ``(rank, 2)``."""
    directions, _ = np.linalg.qr(rng.standard_normal((rank, 2)))
    return directions @ np.array([[1.0, correlation], [0.0, np.sqrt(1 - correlation**2)]])


def _related(rng: np.random.Generator, vector: Float64Array, correlation: float) -> Float64Array:
    """Draw a unit vector whose inner product with a unit vector is ``correlation``."""
    other = rng.standard_normal(len(vector))
    other -= (other @ vector) * vector
    other /= np.linalg.norm(other)
    return correlation * vector + np.sqrt(1 - correlation**2) * other


def _positive(deviation: Float64Array) -> Float64Array:
    # Constant features have no spread to divide by.
    return np.where(deviation > 0, deviation, 1.0)


def _draw_numerical(rng: np.random.Generator, rows: int, columns: int) -> Float64Array:
    # In [0, 1], many zeros, 6 decimals, as in AliExpress.
    values = rng.random((rows, columns)) ** 2
    values[rng.random((rows, columns)) < 0.2] = 0
    return values.round(6)


def _sigmoid(logits: Float64Array) -> Float64Array:
    return 1 / (1 + np.exp(-logits))


def _fit_bias(slopes: Float64Array, weights: Float64Array, rate: float) -> float:
    """Bisect for the bias at which the weighted mean probability is ``rate``."""
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        mean = np.average(_sigmoid(slopes + middle), weights=weights)
        low, high = (middle, high) if mean < rate else (low, middle)
    return (low + high) / 2
