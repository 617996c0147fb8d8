"""Write the report of finished runs: results, tables, figures and one page.

``python -m mtnrec.report runs=runs/table_1 baseline=optimizer.lr=1e-3``
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich import get_console
from rich.progress import track

from mtnrec.command.entry_point import entry_point
from mtnrec.reporting.figure.catalogue import PlannedFigure, write_figures
from mtnrec.reporting.page import write_page
from mtnrec.reporting.runs import read_runs, unfinished
from mtnrec.reporting.table.ranks import rank_arms, rank_tables
from mtnrec.reporting.table.render import write_tables
from mtnrec.reporting.table.scores import comparisons, difference_table, score_table, split_by_table


@entry_point("report")
def _report(cfg: DictConfig) -> None:
    """Write the report of finished runs: results, tables, figures and one page."""
    root, out, console = Path(cfg.runs), Path(cfg.out), get_console()
    runs = read_runs(root, cfg.baseline)
    left_out = [*runs.unreadable, *unfinished(root)]
    compared = comparisons(runs.results, metric=cfg.metric, split=cfg.split)
    scores, differences = [], []
    for title, part in split_by_table(runs.results).items():
        cells = comparisons(part, metric=cfg.metric, split=cfg.split)
        scores.append(score_table(cells, title))
        if (cells["pairs"] > 0).any():
            differences.append(difference_table(cells, f"{title}: differences"))

    ranks = list(
        rank_tables(rank_arms(runs.results, metric=cfg.metric, split=cfg.split), cfg.split)
    )

    runs.write(out)
    write_tables(out / "tables", [*scores, *differences, *ranks])
    figures = write_figures(out / "figures", runs, _track)
    page = out / "index.html"
    write_page(
        page,
        runs,
        left_out=left_out,
        compared=compared,
        scores=scores,
        differences=differences,
        ranks=ranks,
        figures=figures,
    )
    tables = len(scores) + len(differences) + len(ranks)
    console.print(
        f"{len(runs)} runs, {tables} tables and {len(figures)} figures; the page is "
        f"{page.resolve().as_uri()}",
        markup=False,
        soft_wrap=True,
    )


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


def _track(planned: Sequence[PlannedFigure]) -> Iterable[PlannedFigure]:
    """Iterate over the figures behind a progress bar; without a terminal, only iterate."""
    console = get_console()
    return track(planned, "figures", console=console) if console.is_terminal else planned


if __name__ == "__main__":
    main()
