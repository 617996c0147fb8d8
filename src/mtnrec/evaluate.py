"""Measure a trained model on labelled rows.

``python -m mtnrec.evaluate checkpoint=runs/esmm table=rows.csv``
"""

from pathlib import Path

from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point
from mtnrec.predict import open_model
from mtnrec.serving.evaluation import evaluate, metrics_table
from mtnrec.system.files import writable, write_json


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Print the metrics of a model on labelled rows, and write them to a JSON file."""
    scorer, rows = open_model(cfg, group=cfg.group)
    found = evaluate(scorer, rows, min_group_rows=cfg.min_group_rows)
    console = get_console()
    console.print(metrics_table(scorer.manifest.schema, found))
    if cfg.out is not None:
        with writable(Path(cfg.out)):
            write_json(Path(cfg.out), {"rows": found.rows, "metrics": found.metrics})
        console.print(f"The metrics are in {cfg.out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
