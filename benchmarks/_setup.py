"""Config, data and model of a run, for benchmarks that train without its protocol."""

from collections.abc import Callable
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from mtnrec.batch import Batch
from mtnrec.command.config import CONF_DIR, optimizer_keys
from mtnrec.data.datamodule import DataModule
from mtnrec.schema import Schema
from mtnrec.training.module import MultiTaskModule


def compose_train(*overrides: str) -> DictConfig:
    """Return the config of ``python -m mtnrec.train`` with these overrides."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def make_data(cfg: DictConfig) -> DataModule:
    """Return the prepared data set with its noise, before its set-up."""
    datamodule: DataModule = instantiate(cfg.data, _convert_="all")
    datamodule.noise = instantiate(cfg.noise, _convert_="all")
    datamodule.prepare_data()
    return datamodule


def make_network(cfg: DictConfig, schema: Schema) -> nn.Module:
    """Return the network."""
    network: nn.Module = instantiate(cfg.model, _partial_=True, _convert_="all")(schema=schema)
    return network


def make_module(cfg: DictConfig, schema: Schema) -> MultiTaskModule:
    """Return the network in its LightningModule, with the optimiser."""
    network = make_network(cfg, schema)
    return MultiTaskModule(network, schema=schema, optimizer=optimizer_of(cfg))


def take_step(module: MultiTaskModule, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take a training step without a trainer."""
    loss = module.objective(module.network, batch)[0]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def optimizer_of(cfg: DictConfig) -> Callable[..., Any]:
    """Return the call that makes the optimiser from parameters."""
    made: Callable[..., Any] = instantiate(optimizer_keys(cfg.optimizer))
    return made
