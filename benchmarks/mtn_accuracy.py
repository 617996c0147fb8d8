"""Deviation of MTN's default from the exact method in the logged values of the mechanism.

``python benchmarks/mtn_accuracy.py --models esmm --sizes small --lams 1e-5 1e-3 --seeds 0 1``

The default and the exact method (``refresh_every=1`` in float64) train the same model on the same
batches. After each epoch the largest relative difference over layers and unfoldings is taken for
the norms (``norm``: nuclear and Frobenius norms; ``R``: their weighted sum in the loss), the loss
share, the alphas and the effective ranks, and for a spectrum's values relative to its largest. The
worst epoch is printed. The row *rounding* is the same for the exact method in float32: the
difference that precision alone makes between two trainings. The row *kept vectors* compares what
the default logs between two exact spectra with an exact decomposition of the same weights. *Norm
without* is how much larger the
nuclear norms are without MTN: the size of the effect that the default approximates.

*small*: embedding width 16, towers 32-16 (ESMM 64-32-32-16), batches of 512 from 60,000 rows.
*full*: the defaults of ``conf/``.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from _setup import compose_train, make_data, make_network, optimizer_of
from hydra.utils import instantiate
from torch import Tensor

from mtnrec.batch import Batch
from mtnrec.model.loss import cross_entropies
from mtnrec.mtn.trace_norm import effective_rank, frobenius_norm
from mtnrec.system.performance import tune_process

SMALL = {
    "shared_bottom": ["model.bottom_widths=[64,32]", "model.tower_widths=[32,16]"],
    "esmm": ["model.tower_widths=[64,32,32,16]"],
    "mmoe": ["model.experts=4", "model.expert_widths=[64,32]", "model.tower_widths=[32,16]"],
}
FIGURES = ("norm", "R", "loss share", "alpha", "effective rank", "spectrum")
Epoch = dict[str, Any]


def compose_training(model: str, size: str, seed: int, data_root: str, *keys: str) -> Any:
    """Return the config of a training."""
    overrides = [f"model={model}", f"seed={seed}", f"data_root={data_root}", *keys]
    if size == "small":
        overrides += [*SMALL[model], "model.embedding_dim=16"]
        overrides += ["data.rows=60000", "data.batch_size=512"]
    return compose_train(*overrides)


def load(cfg: Any, epochs: int) -> tuple[Any, list[list[Batch]]]:
    """Return the schema and the batches of each epoch."""
    datamodule = make_data(cfg)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    return datamodule.schema, [list(loader) for _ in range(epochs)]


def train(cfg: Any, schema: Any, epochs: list[list[Batch]], dtype: torch.dtype) -> Iterator[Epoch]:
    """Train; yield the logged values of the mechanism after each epoch."""
    torch.manual_seed(cfg.seed)
    network: Any = make_network(cfg, schema).to(dtype)
    optimizer = optimizer_of(cfg)(network.parameters())
    mtn = instantiate(cfg.mtn, _convert_="all")
    trainer: Any = SimpleNamespace(precision_plugin=None, global_step=0)
    module: Any = SimpleNamespace(network=network, device=torch.device("cpu"))
    mtn.setup(trainer, module, "fit")
    mtn.on_train_start(trainer, module)
    for batches in epochs:
        losses = []
        for batch in batches:
            batch = replace(batch, numerical=batch.numerical.to(dtype))
            loss = cross_entropies(network(batch), batch.labels).sum()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            mtn.on_before_optimizer_step(trainer, None, optimizer)
            optimizer.step()
            trainer.global_step += 1
        loss = sum(losses) / len(losses)
        kept = _figures(mtn, loss, mtn._measure(mtn._penalty, trainer.global_step, exact=False))
        exact = _figures(mtn, loss, mtn._measure(mtn._penalty, trainer.global_step))
        yield exact | {"kept": kept}


def _figures(mtn: Any, loss: float, found: list[list[Tensor]]) -> Epoch:
    penalty, spectra = mtn._penalty, [s for depth in found for s in depth]
    frobenius = [frobenius_norm(penalty.stack(depth)) for depth in penalty.depths]
    total = (penalty.weights.layer_weights(penalty.norms()) @ penalty.norms()).detach()
    return {
        "norm": torch.stack([*(s.sum() for s in spectra), *frobenius]),
        "R": total,
        "loss share": mtn.lam * total / (loss + mtn.lam * total),
        "alpha": penalty.weights.alpha().detach(),
        "effective rank": torch.stack([effective_rank(s) for s in spectra]),
        "spectrum": spectra,
    }


def difference(found: Epoch, exact: Epoch, name: str) -> float:
    """Return the largest relative difference of a figure."""
    if name == "spectrum":
        pairs = zip(found[name], exact[name], strict=True)
        return max(((a - b).abs().max() / b.max()).item() for a, b in pairs)
    differences: Tensor = (found[name] / exact[name] - 1).nan_to_num(0, 0, 0)
    return differences.abs().max().item()


def worst(found: list[Epoch], exact: list[Epoch]) -> list[str]:
    """Return each figure's largest relative difference over the epochs, as text."""
    pairs = list(zip(found, exact, strict=True))
    return [f"{max(difference(f, e, name) for f, e in pairs):.2%}" for name in FIGURES]


def main() -> None:
    """Print one row per training and one for rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SMALL))
    parser.add_argument("--sizes", nargs="+", default=["small", "full"])
    parser.add_argument("--lams", nargs="+", default=["1e-6", "1e-5", "1e-4", "1e-3", "1e-2"])
    parser.add_argument("--couplings", nargs="+", default=["gradient", "decoupled"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--refresh-every", default="128")
    arguments = parser.parse_args()
    tune_process(torch.device("cpu"))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    columns = ["model", "size", "coupling", "lambda", "seed", "method", *FIGURES, "norm without"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for size in arguments.sizes:
        for model in arguments.models:
            for seed in arguments.seeds:
                data = compose_training(model, size, seed, arguments.data_root)
                schema, epochs = load(data, arguments.epochs)
                for coupling in arguments.couplings:
                    for lam in arguments.lams:
                        _compare(arguments, size, model, seed, coupling, lam, schema, epochs)


def _compare(
    arguments: Any,
    size: str,
    model: str,
    seed: int,
    coupling: str,
    lam: str,
    schema: Any,
    epochs: list[list[Batch]],
) -> None:
    def run(every: str, dtype: torch.dtype, lam: str) -> list[Epoch]:
        keys = [f"mtn.lam={lam}", f"mtn.coupling={coupling}", f"mtn.refresh_every={every}"]
        keys = ["mtn.enabled=true", *keys]
        cfg = compose_training(model, size, seed, arguments.data_root, *keys)
        return list(train(cfg, schema, epochs, dtype))

    exact = run("1", torch.float64, lam)
    without = run("128", torch.float32, "0")
    default = run(arguments.refresh_every, torch.float32, lam)
    methods = {
        "default": (default, exact),
        "kept vectors": ([epoch["kept"] for epoch in default], default),
        "rounding": (run("1", torch.float32, lam), exact),
    }
    excess = max(
        (w["norm"] / e["norm"]).max().item() - 1 for w, e in zip(without, exact, strict=True)
    )
    for method, pair in methods.items():
        cells = [f"`{model}`", size, coupling, lam, str(seed), method, *worst(*pair)]
        print(f"| {' | '.join([*cells, f'{excess:.0%}'])} |", flush=True)


if __name__ == "__main__":
    main()
