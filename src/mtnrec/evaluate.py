"""Measure a trained model on labelled rows.

``python -m mtnrec.evaluate checkpoint=runs/esmm table=rows.csv``
"""

from pathlib import Path

from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point
from mtnrec.command.job import job_overrides, make_datamodule
from mtnrec.files import writable, write_json
from mtnrec.performance import prefer_onednn_matmul
from mtnrec.serving.evaluation import evaluate, metrics_table
from mtnrec.serving.rows import open_rows
from mtnrec.serving.scorer import load_checkpoint


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Print the metrics of a model on labelled rows, and write them to a JSON file."""
    scorer = load_checkpoint(cfg.checkpoint, cfg.device, allow=cfg.allow)
    prefer_onednn_matmul(scorer.device)
    rows = open_rows(
        scorer,
        data=None if cfg.data is None else make_datamodule(cfg.data, job_overrides()),
        table=cfg.table,
        split=cfg.split,
        batch_size=cfg.batch_size,
        group=cfg.group,
    )
    found = evaluate(scorer, rows)
    console = get_console()
    console.print(metrics_table(scorer.manifest.schema, found))
    if cfg.out is not None:
        with writable(Path(cfg.out)):
            write_json(Path(cfg.out), {"rows": found.rows, "metrics": found.metrics})
        console.print(f"The metrics are in {cfg.out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
