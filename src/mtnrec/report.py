"""Write the report of finished runs: results, tables, figures and one page.

``python -m mtnrec.report runs=runs/table_1 out=report``
"""

from pathlib import Path

from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point
from mtnrec.reporting.figure.catalogue import write_figures
from mtnrec.reporting.page import write_page
from mtnrec.reporting.runs import read_runs, unfinished
from mtnrec.reporting.table.render import write_tables
from mtnrec.reporting.table.scores import comparisons, difference_table, score_table, split_by_table


@entry_point("report")
def main(cfg: DictConfig) -> None:
    """Write the report of finished runs: results, tables, figures and one page."""
    root, out, console = Path(cfg.runs), Path(cfg.out), get_console()
    runs = read_runs(root)
    left_out = [*runs.unreadable, *unfinished(root)]
    cells, tables = [], []
    for title, part in split_by_table(runs.results).items():
        compared = comparisons(part, metric=cfg.metric, split=cfg.split)
        cells.append(compared)
        tables.append(score_table(compared, title))
        if (compared["pairs"] > 0).any():
            tables.append(difference_table(compared, f"{title}: differences"))

    runs.write(out)
    write_tables(out / "tables", tables)
    with console.status("drawing"):
        figures = write_figures(out / "figures", runs)
    page = out / "index.html"
    write_page(page, runs, left_out=left_out, cells=cells, tables=tables, figures=figures)
    console.print(
        f"{len(runs)} runs, {len(tables)} tables and {len(figures)} figures; the page is {page}",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
