"""Score the rows of a prepared data set or of a table with a trained model.

``python -m mtnrec.predict checkpoint=runs/esmm/checkpoints/best.ckpt table=rows.csv
out=scores.parquet``
"""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import get_console

from mtnrec.checks import InputError, check_integer
from mtnrec.command.entry_point import entry_point
from mtnrec.performance import prefer_onednn_matmul
from mtnrec.serving.prediction import PreparedRows, TableRows, means_table, write_scores
from mtnrec.serving.scorer import load_checkpoint


@entry_point("predict")
def main(cfg: DictConfig) -> None:
    """Write the probability of each task for each row to a Parquet file."""
    check_integer("batch_size", cfg.batch_size, minimum=1)
    if (cfg.data is None) == (cfg.table is None):
        given = "neither" if cfg.data is None else "both"
        raise InputError(
            f"exactly one of data and table must be given, got {given}. Set data=NAME (a prepared "
            "data set) or table=FILE (raw values)."
        )
    out = Path(cfg.out)
    if out.suffix != ".parquet":
        raise InputError(f"out must be a .parquet file, got {out}")
    scorer = load_checkpoint(cfg.checkpoint, cfg.device)
    prefer_onednn_matmul(scorer.device)
    rows: TableRows | PreparedRows
    if cfg.table is not None:
        rows = TableRows(scorer, Path(cfg.table), list(cfg.keep), cfg.batch_size)
    else:
        datamodule = instantiate(cfg.data, _convert_="all")
        datamodule.prepare_data()
        rows = PreparedRows(scorer, Path(datamodule.dir), cfg.split, cfg.batch_size)
    means = write_scores(scorer, rows, out)
    console = get_console()
    console.print(means_table(scorer, means))
    console.print(f"The scores are in {out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
