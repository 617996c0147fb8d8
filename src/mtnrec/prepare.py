"""Turn raw logs into a prepared data set.

``python -m mtnrec.prepare data=aliexpress_nl data.raw_dir=DIR``
"""

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point


@entry_point("prepare")
def main(cfg: DictConfig) -> None:
    """Turn raw logs into a prepared data set, atomically."""
    datamodule = instantiate(cfg.data, _convert_="all")
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
