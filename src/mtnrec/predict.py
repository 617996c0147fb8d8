"""Score the rows of a prepared data set or of a table with a trained model.

``python -m mtnrec.predict checkpoint=runs/esmm table=rows.csv out=scores.csv``
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich import get_console

from mtnrec.checks import InputError
from mtnrec.command.entry_point import entry_point
from mtnrec.command.job import job_overrides, make_datamodule
from mtnrec.serving.prediction import FORMATS, rates_table, write_scores
from mtnrec.serving.rows import Rows, open_rows
from mtnrec.serving.scorer import Scorer, load_checkpoint
from mtnrec.system.performance import prefer_onednn_matmul


@entry_point("predict")
def main(cfg: DictConfig) -> None:
    """Write the probability of each task for each row to a Parquet or csv file."""
    out = Path(cfg.out)
    if out.suffix not in FORMATS:
        raise InputError(f"out must be a {' or '.join(FORMATS)} file, got {out}")
    scorer, rows = open_model(cfg, keep=cfg.keep)
    written = write_scores(scorer, rows, out)
    console = get_console()
    console.print(rates_table(scorer, written))
    console.print(f"The scores are in {out}", markup=False, soft_wrap=True)


def open_model(
    cfg: DictConfig, *, keep: Sequence[str] = (), group: str | None = None
) -> tuple[Scorer, Rows]:
    """Load the model of a command's config and open its rows; print the form of a csv file."""
    scorer = load_checkpoint(cfg.checkpoint, cfg.device, allow=cfg.allow)
    prefer_onednn_matmul(scorer.device)
    rows = open_rows(
        scorer,
        data=None if cfg.data is None else make_datamodule(cfg.data, job_overrides()),
        table=cfg.table,
        split=cfg.split,
        batch_size=cfg.batch_size,
        keep=keep,
        group=group,
        separator=cfg.separator,
        decimal=cfg.decimal,
    )
    if rows.form:
        get_console().print(rows.form, markup=False, soft_wrap=True)
    return scorer, rows


if __name__ == "__main__":
    main()
