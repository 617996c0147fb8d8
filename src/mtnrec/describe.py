"""Describe a prepared data set: rates, fields, drift and suspected leaks.

``python -m mtnrec.describe data=aliexpress_nl``, or, to see what noise would change,
``python -m mtnrec.describe data=aliexpress_nl noise.proportion=0.1``
"""

from functools import partial
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import get_console

from mtnrec.command.entry_point import entry_point
from mtnrec.command.job import job_overrides, make_datamodule
from mtnrec.data.prepared.store import open_prepared
from mtnrec.inspection.layout import check_destination, render_summary
from mtnrec.inspection.leaks import check_leaks
from mtnrec.inspection.statistics import count_changes, count_split
from mtnrec.system.files import write_atomic


@entry_point("describe")
def main(cfg: DictConfig) -> None:
    """Describe a prepared data set, on the screen and in a text file."""
    datamodule = make_datamodule(cfg.data, job_overrides())
    out = Path(cfg.out)
    check_destination(out, datamodule.dir)
    datamodule.prepare_data()
    manifest, arrays = open_prepared(datamodule.dir)
    schema = manifest.schema

    statistics = {split: count_split(found, schema) for split, found in arrays.items()}
    leaks = check_leaks(arrays["train"], np.arange(manifest.rows["train"]), schema)

    noise, changes = instantiate(cfg.noise, _convert_="all"), {}
    if noise.proportion or noise.flips_labels:
        datamodule.noise = noise
        datamodule.setup()
        for split in noise.splits:
            columns, rows = datamodule.stored(split)
            changes[split] = count_changes(columns, rows, schema, partial(noise.apply, split))

    report = render_summary(datamodule.dir, manifest, statistics, leaks, changes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, report)
    console = get_console()
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    console.print(f"The report is {out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
