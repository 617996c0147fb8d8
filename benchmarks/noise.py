"""Cost of noise as a share of an epoch of shared-bottom, the model with the shortest epochs.

``python benchmarks/noise.py`` generates the two synthetic logs if they are missing: one shaped like
AliExpress (16 categorical and 63 numerical features), one like Ali-CCP (18 categorical fields). It
takes a few minutes and needs an idle machine.
"""

import logging
from itertools import product
from time import perf_counter
from typing import Any

import lightning as L
from _setup import compose_train, make_data, make_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box, get_console
from rich.table import Table

from mtnrec.command.config import lightning_keys
from mtnrec.data.datamodule import DataModule
from mtnrec.system.performance import tune_process

_EPOCHS = 4
_PASSES = 7


class _EpochTimer(L.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._started = perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(perf_counter() - self._started)


def _compose(*overrides: str) -> DictConfig:
    own = ("model=shared_bottom", "trainer.accelerator=cpu", f"trainer.max_epochs={_EPOCHS}")
    return compose_train(*own, *overrides)


def _set_up(cfg: DictConfig) -> tuple[DataModule, float]:
    """Return the data set and the seconds of its set-up."""
    datamodule = make_data(cfg)
    start = perf_counter()
    datamodule.setup()
    return datamodule, perf_counter() - start


def _train(cfg: DictConfig) -> float:
    """Return the seconds of the shortest training epoch, without noise."""
    datamodule, _ = _set_up(cfg)
    module = make_module(cfg, datamodule.schema)
    timer = _EpochTimer()
    quiet_trainer = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(
        lightning_keys(cfg.trainer), callbacks=[timer], limit_val_batches=0, **quiet_trainer
    )
    tune_process(trainer.strategy.root_device)
    trainer.fit(module, datamodule=datamodule)
    return min(timer.seconds)


def _pass(datamodule: DataModule) -> float:
    """Return the seconds to gather all training rows once."""
    loader = datamodule.train_dataloader()
    start = perf_counter()
    for _ in loader:
        pass
    return perf_counter() - start


def _checksum(datamodule: DataModule) -> float:
    """Return the seconds to record the noise."""
    start = perf_counter()
    datamodule.noise.record(datamodule.row_numbers)
    return perf_counter() - start


def main() -> None:
    """Print a table per data set with one row per sampling and proportion."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    settings = list(product(("uniform", "empirical"), (0.05, 0.15, 1.0)))
    for data in ("synthetic", "synthetic_ali_ccp"):
        epoch = _train(_compose(f"data={data}"))
        clean, clean_set_up = _set_up(_compose(f"data={data}"))
        noisy = [
            _set_up(_compose(f"data={data}", f"noise.sampling={s}", f"noise.proportion={p}"))
            for s, p in settings
        ]
        # In turn, so that other load on the machine affects all alike.
        passes = [[_pass(d) for d in (clean, *(d for d, _ in noisy))] for _ in range(_PASSES)]
        shortest, *noisy_passes = map(min, zip(*passes, strict=True))
        table = Table(title=f"{data}: an epoch takes {epoch:.2f} s", box=box.SIMPLE_HEAD)
        table.add_column("sampling")
        for header in ("proportion", "noise", "share of the epoch", "set-up", "checksum"):
            table.add_column(header, justify="right")
        rows = zip(settings, noisy, noisy_passes, strict=True)
        for (sampling, proportion), (datamodule, set_up), seconds in rows:
            table.add_row(
                sampling,
                f"{proportion:g}",
                f"{seconds - shortest:.3f} s",
                f"{(seconds - shortest) / epoch:.2%}",
                f"{set_up - clean_set_up:.2f} s",
                f"{_checksum(datamodule):.2f} s",
            )
        get_console().print(table)


if __name__ == "__main__":
    main()
