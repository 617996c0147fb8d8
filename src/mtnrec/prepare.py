"""Turn raw logs into a prepared data set.

``python -m mtnrec.prepare data=aliexpress_nl data.raw_dir=DIR``
"""

from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point
from mtnrec.command.job import job_overrides, make_datamodule


@entry_point("prepare")
def main(cfg: DictConfig) -> None:
    """Turn raw logs into a prepared data set, atomically."""
    datamodule = make_datamodule(cfg.data, job_overrides())
    if not cfg.overwrite:
        datamodule.check_replaceable()
    manifest = datamodule.prepare()
    console = get_console()
    console.print(
        f"{manifest.source} is prepared in {datamodule.dir}", markup=False, soft_wrap=True
    )
    for split, rows in manifest.rows.items():
        positives = manifest.positives[split].items()
        shares = ", ".join(f"{label} {n:,} ({n / rows:.3%})" for label, n in positives)
        console.print(f"  {split}: {rows:,} rows; {shares}")
    for name, count in manifest.report.items():
        console.print(f"  {name.replace('_', ' ')}: {count:,}")


if __name__ == "__main__":
    main()
