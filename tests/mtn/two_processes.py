"""Train with MTN on one or two processes over the same global batches; run by a test.

``python two_processes.py DEVICES OUT OPTIMIZER [unlike]`` writes ``OUT_RANK.pt``; with ``unlike``
the second process is a machine whose directions come out differently.
"""

import sys
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from mtnrec.batch import Batch
from mtnrec.data.batches import RowGatherer
from mtnrec.data.samplers import TrainSampler
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.mtn import penalty
from mtnrec.mtn.callback import MTN
from mtnrec.mtn.polar import PolarFactor, add_polar_from_vectors, polar_factors
from mtnrec.optimizer.lazy_adam import LazyAdam
from mtnrec.schema import CategoricalField, Schema
from mtnrec.training.module import MultiTaskModule

ROWS, GLOBAL_BATCH = 96, 32
# More values of "a" than rows in a batch: some rows of its table are in none.
SCHEMA = Schema((CategoricalField("a", 40),), ("x", "y"), ("click", "conversion"), funnel=True)
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "lazy_adam": partial(LazyAdam, lr=1e-2, betas=[0.9, 0.999], eps=1e-8),
}


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Batch]:
        rng = np.random.default_rng(0)
        click = rng.integers(0, 2, ROWS)
        arrays = {
            "categorical": rng.integers(0, 40, (ROWS, 1), dtype=np.int32),
            "numerical": rng.random((ROWS, 2)),
            "labels": np.stack([click, click * rng.integers(0, 2, ROWS)], 1).astype(np.uint8),
        }
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = TrainSampler(ROWS, GLOBAL_BATCH // world, 0, rank, world)
        return DataLoader(
            RowGatherer(arrays, np.arange(ROWS), SCHEMA), sampler=sampler, batch_size=None
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.train_dataloader()


def add_polar_from_vectors_of_machine(
    total: torch.Tensor, weight: float, *arguments: Any
) -> torch.Tensor:
    share = 1 - 0.05 * dist.get_rank()
    return add_polar_from_vectors(total, weight * share, *arguments) * share


def polar_factors_of_machine(*arguments: Any) -> list[PolarFactor]:
    share = 1 - 0.05 * dist.get_rank()
    return [f._replace(factor=f.factor * share) for f in polar_factors(*arguments)]


def main(devices: int, out: str, optimizer: str, machines: str = "alike") -> None:
    torch.manual_seed(0)
    if machines == "unlike":
        penalty.add_polar_from_vectors = add_polar_from_vectors_of_machine
        penalty.polar_factors = polar_factors_of_machine
    network = SharedBottom(
        SCHEMA,
        embedding_dim=4,
        bag_mode="mean",
        bottom_widths=[6],
        tower_widths=[5, 4],
        dropout=0.0,
        batch_norm=False,
    )
    mtn = MTN(
        enabled=True,
        lam=0.05,
        target="towers",
        layers="all",
        subsets="distinct",
        alpha="learned",
        layer_weighting="mean",
        frobenius=True,
        coupling="gradient",
        refresh_every=1 if machines == "alike" else 128,
        alpha_optimizer=partial(torch.optim.Adam, lr=1e-2),
    )

    def keep(trainer: L.Trainer, module: L.LightningModule) -> None:
        state = mtn.state_dict()
        found = {"model": network.state_dict(), "alpha": state["weights"]["alpha_logits"]}
        torch.save(found, f"{out}_{trainer.global_rank}.pt")

    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",  # torch is imported once
        precision="64-true",
        max_epochs=3,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[mtn, LambdaCallback(on_train_end=keep)],
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = MultiTaskModule(network, schema=SCHEMA, optimizer=OPTIMIZERS[optimizer])
    trainer.fit(module, datamodule=Data())


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
