"""Ranks of arms over data sets (Demsar, JMLR 2006)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mtnrec.metric.catalogue import metric_info
from mtnrec.reporting.baseline import natural_order
from mtnrec.reporting.labels import LABEL_NOISE
from mtnrec.reporting.significance import RankTest, compare_ranks
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.reporting.table.scores import data_name, in_order, name_values, p_text

_FEWEST_DATA, _FEWEST_ARMS = 2, 3
_ROUGH = 10  # data sets below which the distribution of Friedman's statistic is approximated badly
_EMPTY = "—"


@dataclass(frozen=True)
class Ranking:
    """Arms ranked on one task over data sets, under one noise.

    Args:
        task: Name of the task.
        noise: Feature and label noise; empty without noise.
        values: Name of the metric and the split.
        arms: Names of the ranked arms.
        colors: Numbers of their colours.
        data: Names of the data sets.
        seeds: Seeds that all arms share, by data set.
        left_out: Arms and data sets that are not ranked, since they lack values.
        test: Ranks and tests, in the order of the arms.
    """

    task: str
    noise: str
    values: str
    arms: tuple[str, ...]
    colors: tuple[int, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]
    test: RankTest


def rank_arms(results: pd.DataFrame, *, metric: str = "auc", split: str = "test") -> list[Ranking]:
    """Return a ranking per noise and task with at least three arms on two data sets.

    An arm's rank on a data set is that of its mean over the seeds that all ranked arms have there.
    Where not every arm has the metric on every data set, the largest set of arms that share data
    sets is ranked.

    Args:
        results: Rows of :attr:`Runs.results`.
        metric: Metric that ranks the arms; its better direction decides.
        split: Split that it is measured on.
    """
    chosen = results[(results["metric"] == metric) & (results["split"] == split)]
    chosen = chosen.dropna(subset="value")
    flips = chosen["data"].str.extract(rf"({LABEL_NOISE}[^)]*)", expand=False).fillna("")
    features = chosen["noise"].map(lambda noise: f"noise {noise:g}" if noise else "")
    chosen = chosen.assign(condition=features.str.cat(flips, sep=", ").str.strip(", "))
    tasks = in_order(chosen["task"])
    found = [_rank(rows) for _, rows in chosen.groupby(["condition", "task"])]
    return sorted(
        (ranking for ranking in found if ranking is not None),
        key=lambda ranking: (natural_order(ranking.noise), tasks.index(ranking.task)),
    )


def rank_tables(rankings: Sequence[Ranking]) -> Iterator[Table]:
    """Yield a table of mean ranks per noise: a row per arm, a column per task.

    Args:
        rankings: Output of :func:`rank_arms`.
    """
    for noise in dict.fromkeys(ranking.noise for ranking in rankings):
        yield _table([ranking for ranking in rankings if ranking.noise == noise])


def _rank(rows: pd.DataFrame) -> Ranking | None:
    """Rank the arms of one task and noise; None if too few share data sets."""
    values = rows.pivot_table(index=["checksum", "seed"], columns="label", values="value")
    data, arms = _complete(values.notna().groupby("checksum").any())
    common = values.loc[values.index.isin(data, level="checksum"), arms].dropna()
    means = common.groupby("checksum", sort=False).mean()
    if len(means) < _FEWEST_DATA or len(arms) < _FEWEST_ARMS:
        return None
    info = metric_info(rows["metric"].iloc[0], rows["better"].iloc[0])
    names = rows.drop_duplicates("checksum").set_index("checksum")["data"].map(data_name)
    left_out = [names[other] for other in names.index if other not in means.index]
    left_out += [arm for arm in values.columns if arm not in arms]
    colors = rows.drop_duplicates("label").set_index("label")["color"]
    return Ranking(
        task=rows["task"].iloc[0],
        noise=rows["condition"].iloc[0],
        values=name_values(rows["metric"].iloc[0], rows["split"].iloc[0]),
        arms=tuple(arms),
        colors=tuple(int(colors[arm]) for arm in arms),
        data=tuple(names[other] for other in means.index),
        seeds=tuple(int(n) for n in common.groupby("checksum", sort=False).size()),
        left_out=tuple(left_out),
        test=compare_ranks(info.cost(means.to_numpy())),
    )


def _complete(has: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the data sets and the arms of the largest table without gaps.

    Args:
        has: Whether an arm has a value, one row per data set and one column per arm.
    """
    by_size = has.loc[has.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    shared = by_size.cummin()  # whether an arm has this data set and all that have more arms
    counts = shared.sum(axis=1).to_numpy()
    sizes = counts * np.arange(1, len(counts) + 1) * (counts >= _FEWEST_ARMS)
    sizes[: _FEWEST_DATA - 1] = 0
    last = int(sizes.argmax())
    arms = shared.columns[shared.iloc[last].to_numpy(bool)]
    return list(shared.index[: last + 1]), list(arms)


def _table(rankings: Sequence[Ranking]) -> Table:
    tasks = tuple(task_title(ranking.task) for ranking in rankings)
    ranks = pd.DataFrame(
        {
            number: dict(zip(ranking.arms, ranking.test.mean_ranks, strict=True))
            for number, ranking in enumerate(rankings)
        }
    )
    ranks = ranks.loc[ranks.mean(axis=1).sort_values(kind="stable").index]
    rows = [
        Row(str(arm), tuple(Cell(_EMPTY if pd.isna(r) else f"{r:.2f}") for r in of_arm))
        for arm, *of_arm in ranks.itertuples()
    ]
    below = {
        "data sets": [f"{len(ranking.data)}" for ranking in rankings],
        "Friedman p": [p_text(ranking.test.p_value) for ranking in rankings],
        "critical difference": [f"{ranking.test.critical_difference:.2f}" for ranking in rankings],
    }
    for name, texts in below.items():
        rows.append(Row(name, tuple(map(Cell, texts)), starts=name == "data sets"))
    values, noise = rankings[0].values, rankings[0].noise
    return Table(
        title=", ".join(filter(None, ["Ranks over data sets", noise])),
        stub="Arm",
        groups=(Group(f"mean rank by {values}", tasks),),
        rows=tuple(rows),
        notes=(
            "Rank 1 is the best arm of a data set; ties share the mean of their ranks. Arms are "
            "ranked by their means over the seeds that all of them have.",
            "Friedman p: whether the arms differ at all, corrected for ties. Critical difference: "
            "two arms whose mean ranks differ by more differ significantly at 5 %, over all pairs "
            "of arms (Nemenyi's test; Demšar, JMLR 2006).",
            *_sources(rankings),
        ),
        warnings=tuple(_warnings(rankings)),
    )


def _sources(rankings: Sequence[Ranking]) -> Iterator[str]:
    """Yield the data sets of each task with their numbers of seeds."""
    found: dict[str, list[str]] = {}
    for ranking in rankings:
        pairs = zip(ranking.data, ranking.seeds, strict=True)
        text = ", ".join(f"{name} ({seeds})" for name, seeds in pairs)
        found.setdefault(text, []).append(task_title(ranking.task))
    for text, tasks in found.items():
        yield f"Data sets, with the number of seeds, of {', '.join(tasks)}: {text}."


def _warnings(rankings: Sequence[Ranking]) -> Iterator[str]:
    fewest = min(len(ranking.data) for ranking in rankings)
    if fewest < _ROUGH:
        yield (
            f"Only {fewest} data sets: the p-value is approximate, and only large differences of "
            "ranks can be significant."
        )
    left_out = dict.fromkeys(name for ranking in rankings for name in ranking.left_out)
    if left_out:
        yield f"Not ranked everywhere, since runs are missing: {', '.join(left_out)}."
