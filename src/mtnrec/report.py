"""Write the report of finished runs: results, tables, figures and one page.

``python -m mtnrec.report runs=runs/table_1 baseline=optimizer.lr=1e-3``
"""

import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
from omegaconf import DictConfig
from rich import get_console
from rich.progress import track

from mtnrec.checks import InputError, check_integer, check_number
from mtnrec.command.entry_point import entry_point
from mtnrec.reporting.figure.catalogue import write_figures
from mtnrec.reporting.leaderboard import copy_records, write_leaderboard
from mtnrec.reporting.page import ReportTables, write_page
from mtnrec.reporting.resampling import resample_runs
from mtnrec.reporting.runs import Runs, read_runs, unfinished
from mtnrec.reporting.table.ranks import rank_arms, rank_tables
from mtnrec.reporting.table.render import write_tables
from mtnrec.reporting.table.scores import (
    choose_results,
    comparisons,
    difference_table,
    row_table,
    score_table,
    split_by_table,
)
from mtnrec.reporting.table.tuning import tuning_tables
from mtnrec.reporting.table.worlds import map_worlds, world_tables, write_worlds

_FEWEST_RESAMPLES = 100
T = TypeVar("T")


@entry_point("report")
def _report(cfg: DictConfig) -> None:
    """Write the report of finished runs: results, tables, figures and one page."""
    check_number("margin", cfg.margin, minimum=sys.float_info.min)
    check_integer("resamples", cfg.resamples, minimum=0)
    if 0 < cfg.resamples < _FEWEST_RESAMPLES:
        raise InputError(
            f"resamples must be 0 or at least {_FEWEST_RESAMPLES}, got {cfg.resamples}: fewer have "
            "no 95 % interval. Set resamples=1000, or 0 to leave out intervals over users."
        )
    root, out, console = Path(cfg.runs), Path(cfg.out), get_console()
    runs = read_runs(root, cfg.baseline)
    if cfg.records is not None or cfg.leaderboard is not None:
        _write_leaderboard(cfg, runs)
        return
    left_out = [*runs.unreadable, *unfinished(root)]
    shown = {"metric": cfg.metric, "split": cfg.split}

    choose_results(runs.results, **shown)  # refuses a metric that no run has, before the resamples
    resampled = resample_runs(
        runs,
        split=cfg.split,
        resamples=cfg.resamples if cfg.metric == "auc" else 0,
        track=partial(_track, "resampling"),
    )

    def compare(results: pd.DataFrame) -> pd.DataFrame:
        return comparisons(results, **shown, margin=cfg.margin, resampled=resampled)

    compared = compare(runs.results)
    scores, differences, over_rows = [], [], []
    for title, part in split_by_table(runs.results).items():
        cells = compare(part)
        scores.append(score_table(cells, title))
        if (cells["pairs"] > 0).any():
            differences.append(difference_table(cells, f"{title}: differences"))
        if (table := row_table(cells, f"{title}: intervals over seeds and users")) is not None:
            over_rows.append(table)
    worlds = map_worlds(runs)
    tables = ReportTables(
        scores=scores,
        differences=differences,
        over_rows=over_rows,
        tuning=list(tuning_tables(runs)),
        ranks=list(rank_tables(rank_arms(runs.results, **shown))),
        worlds=list(world_tables(worlds)),
    )

    runs.write(out)
    write_worlds(out, worlds)
    write_tables(out / "tables", tables.all())
    figures = write_figures(out / "figures", runs, partial(_track, "figures"), **shown)
    page = out / "index.html"
    write_page(page, runs, left_out=left_out, compared=compared, tables=tables, figures=figures)
    console.print(
        f"{len(runs)} runs, {len(tables.all())} tables and {len(figures)} figures; the page is "
        f"{page.resolve().as_uri()}",
        markup=False,
        soft_wrap=True,
    )


def _write_leaderboard(cfg: DictConfig, runs: Runs) -> None:
    """Copy records for a leaderboard, write the page of one, or both, instead of the report."""
    messages = []
    if cfg.records is not None:
        count = copy_records(runs, Path(cfg.records))
        messages.append(f"the records of {count} runs are in {cfg.records}")
    if cfg.leaderboard is not None:
        count = write_leaderboard(runs, Path(cfg.leaderboard))
        messages.append(f"the leaderboard with {count} rows is in {cfg.leaderboard}")
    get_console().print("\n".join(messages), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Write the report of finished runs: results, tables, figures and one page."""
    sys.argv[1:] = map(_quoted, sys.argv[1:])
    _report()


def _quoted(argument: str) -> str:
    """Quote the value of ``baseline=key=value``, in which Hydra's grammar takes no second ``=``.

    >>> _quoted("baseline=optimizer.lr=1e-3")
    'baseline="optimizer.lr=1e-3"'
    """
    key, _, value = argument.partition("=")
    is_plain = key == "baseline" and "=" in value and value[0] not in "'\""
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if is_plain else argument


def _track(what: str, items: Sequence[T]) -> Iterable[T]:
    """Iterate behind a progress bar; without a terminal, only iterate."""
    console = get_console()
    return track(items, what, console=console) if console.is_terminal else items


if __name__ == "__main__":
    main()
