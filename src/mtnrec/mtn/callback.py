"""Lightning callback that trains a model with the multi-layer tensor trace norm."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtnrec.checks import InputError, check_choice, check_flag, check_integer, check_number
from mtnrec.metric.catalogue import layer_key
from mtnrec.mtn.mixing import LAYER_WEIGHTINGS, MixingWeights
from mtnrec.mtn.penalty import Penalty, mean_distance
from mtnrec.mtn.polar import unfolding_spectra
from mtnrec.mtn.schedule import RefreshPolicy
from mtnrec.mtn.trace_norm import effective_rank
from mtnrec.optimizer.layers import LayerChoice
from mtnrec.optimizer.penalty import (
    COUPLINGS,
    SAMPLED_EVERY_N_STEPS,
    Push,
    apply_penalty,
    gradient_scale,
    loss_share,
)

COLLAPSED_ALPHA = 0.99
_LARGEST_GAP = 0.1  # a norm that is further off between two updates is warned about
# Number of mode subsets in eq. 2 that share the norm of each unfolding, and of the full set.
_MULTIPLICITIES = {"distinct": (1, 1, 1), "all": (2, 2, 2, 1)}
_NORMS = ("trace", "capped", "nuclear")
UNFOLDINGS = ("task", "output", "input")  # row modes of the three distinct unfoldings

_ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
_logger = logging.getLogger(__name__)


class MTN(L.Callback):
    """Adds ``lam * sum_i w_i R_i`` to the objective (eq. 5).

    The gradient is added once per optimiser step, after accumulation, all-reduce and unscaling, and
    before clipping. The learned weights and their optimiser belong to the callback and to its part
    of a checkpoint: the model, its ``state_dict`` and its inference are the same with and without
    it. ``train/loss`` is the cross entropy alone. Saving a training checkpoint recomputes all
    factors, so that a run resumed from it, even within an epoch, has the same ones.

    Each epoch logs, under ``mtn/``: ``norm`` (``sum_i w_i R_i``), ``penalty`` (``lam`` times that),
    ``loss_share`` (penalty over loss plus penalty), ``push`` (norm of the penalty's gradient over
    that of the loss's, on the penalised weights), ``zero_gradient_share`` (share of these weights
    without a data gradient, which Adam moves at the full rate whatever ``lam``); and per
    layer ``norm``, ``weight``, ``alpha_*``, ``effective_rank_*``, ``distance`` (mean distance
    between two towers over their mean norm), and the largest deviations from the exact method
    between two decompositions: ``gap`` (relative error of the norm), ``angle`` (degrees between the
    penalty's gradient and the exact one, weights without a data gradient included) and ``length``
    (relative error of its length). The spectra are written to ``spectra/epoch_*.npz`` in the run's
    folder; without MTN too, to compare with.

    Args:
        enabled: Whether the callback is active; ``false`` in ``conf``, so that runs opt in to MTN.
        lam: ``lambda``; the paper uses 1e-5. 0 measures without changing the training.
        target: Layers to penalise: the task ``towers``, or parallel ``shared`` layers (experts).
        layers: ``all``; ``last_hidden``, the deepest with more than one output; or the depths to
            penalise, counted from 0 next to the input.
        norm: Norm in ``R_i``: the paper's tensor ``trace`` norm; ``capped``, each singular value of
            an unfolding up to ``cap`` times its largest, so that only the small ones shrink (Han
            and Zhang, AAAI 2016), which is not convex and needs ``refresh_every=1``; or
            ``nuclear``, the sum of the towers' own trace norms: low rank without a tie between
            tasks, which needs ``alpha=uniform`` and ``subsets=distinct``, as neither applies.
        cap: Threshold of ``norm=capped``, relative to the largest singular value at each step; 0
            penalises nothing, above 1 it is the trace norm.
        subsets: Norms that alpha weights (eq. 2): those of the three ``distinct`` unfoldings, or of
            ``all`` seven non-empty subsets of the modes, where each unfolding counts twice (the
            complement of a set gives its transpose) and the full set, a vector, has the norm
            ``||W_i||_F``; alpha then starts at 2/7, 2/7, 2/7 and 1/7.
        alpha: ``learned``, ``uniform``, or the fixed weights of the task, output and input
            unfolding.
        layer_weighting: ``mean`` (the paper's), ``exponential_decay``, ``learned`` or ``gated``.
        frobenius: Whether ``R_i`` includes the Frobenius term.
        coupling: ``gradient`` adds to the gradient of the loss (the paper's); ``decoupled`` moves
            the weights by ``lr * lam * dR/dW`` apart from the optimiser's step, as AdamW does with
            weight decay.
        refresh_every: Largest number of steps between two decompositions; 1 decomposes at every
            step, the exact method. See :mod:`mtnrec.mtn.penalty` for the steps in between.
        spectra_every: Epochs between two exact decompositions for the logged norms, effective ranks
            and spectra; in the others the kept singular vectors give them, within about 1 %.
        alpha_optimizer: Makes the optimiser of the learned alphas and layer weights.

    Raises:
        InputError: If a value is out of range, or, when fit starts, if the model lacks such layers
            or they differ in shape.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        lam: float = 1e-5,
        target: str = "towers",
        layers: str | Sequence[int] = "all",
        norm: str = "trace",
        cap: float = 0.5,
        subsets: str = "distinct",
        alpha: str | Sequence[float] = "learned",
        layer_weighting: str = "mean",
        frobenius: bool = True,
        coupling: str = "gradient",
        refresh_every: int = 128,
        spectra_every: int = 10,
        alpha_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = _ADAM,
    ) -> None:
        check_flag("mtn.enabled", enabled)
        check_number("mtn.lam", lam, minimum=0)
        self._choice = LayerChoice("mtn", target, layers)
        check_choice("mtn.norm", norm, _NORMS)
        check_number("mtn.cap", cap, minimum=0)
        check_choice("mtn.subsets", subsets, list(_MULTIPLICITIES))
        _check_alpha(alpha)
        check_choice("mtn.layer_weighting", layer_weighting, LAYER_WEIGHTINGS)
        check_flag("mtn.frobenius", frobenius)
        check_choice("mtn.coupling", coupling, COUPLINGS)
        check_integer("mtn.refresh_every", refresh_every, minimum=1)
        check_integer("mtn.spectra_every", spectra_every, minimum=1)
        _check_norm(norm, alpha, subsets, refresh_every)
        self.enabled = enabled
        self.lam = lam
        self.target = target
        self.layers = layers
        self.norm = norm
        self.cap = cap
        self.subsets = subsets
        self.alpha = alpha
        self.layer_weighting = layer_weighting
        self.frobenius = frobenius
        self.coupling = coupling
        self.refresh_every = refresh_every
        self.spectra_every = spectra_every
        self.alpha_optimizer = alpha_optimizer

        self._penalty: Penalty | None = None
        self._optimizer: Optimizer | None = None
        self._restored: dict[str, Any] = {}
        self._zero_gradient_shares: list[Tensor] = []
        self._push = Push()
        self._collapsed: set[int] = set()
        self._deviated: set[int] = set()
        self._measured_at = 0
        self._deferred_steps = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.enabled or stage != "fit":
            return
        self._deferred_steps = 0
        depths = self._choice.find(pl_module.network)
        is_nuclear = self.norm == "nuclear"
        weights = MixingWeights(
            layers=len(depths),
            multiplicities=(1,) if is_nuclear else _MULTIPLICITIES[self.subsets],
            alpha=self.alpha,
            layer_weighting=self.layer_weighting,
        )
        self._penalty = Penalty(
            depths,
            weights,
            frobenius=self.frobenius,
            policy=self._make_policy(),
            cap=self.cap if self.norm == "capped" else None,
            per_tower=is_nuclear,
        )

    def _make_policy(self) -> RefreshPolicy:
        if self.coupling == "decoupled":  # no optimiser magnifies the penalty
            return RefreshPolicy(longest=self.refresh_every)
        return RefreshPolicy.for_lambda(self.lam, self.refresh_every)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._penalty is None:
            return
        weights = self._penalty.weights
        learned = list(weights.parameters())
        try:
            self._optimizer = self.alpha_optimizer(learned) if learned else None
        except (ValueError, TypeError) as error:
            raise InputError(f"mtn.alpha_optimizer: {error}") from error
        if self._restored:
            weights.load_state_dict(self._restored["weights"])
            if self._optimizer is not None:
                self._optimizer.load_state_dict(self._restored["optimizer"])
            shares = self._restored["zero_gradient_shares"]
            self._zero_gradient_shares = [share.to(pl_module.device) for share in shares]
            if "push" in self._restored:  # not in checkpoints of earlier versions
                self._push.load_state_dict(self._restored["push"], pl_module.device)
            self._penalty.load_state_dict(self._restored["penalty"], trainer.global_step)
            self._measured_at = trainer.global_step
        else:
            self._measure(self._penalty, trainer.global_step)

    def _measure(self, penalty: Penalty, step: int, *, exact: bool = True) -> list[list[Tensor]]:
        self._apply_deferred_steps(penalty)
        self._measured_at = step
        return penalty.measure(step) if exact else penalty.refresh(step)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # At the end of an epoch the factors are already fresh.
        if self._penalty is not None and self._measured_at != trainer.global_step:
            self._measure(self._penalty, trainer.global_step, exact=self.refresh_every == 1)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        if self._penalty is None:
            return {}
        self._apply_deferred_steps(self._penalty)
        return {
            "weights": self._penalty.weights.state_dict(),
            "optimizer": {} if self._optimizer is None else self._optimizer.state_dict(),
            "penalty": self._penalty.state_dict(),
            "zero_gradient_shares": self._zero_gradient_shares,
            "push": self._push.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._penalty is None:
            return
        if self._penalty.is_due(trainer.global_step):
            self._apply_deferred_steps(self._penalty)
        scale = gradient_scale(trainer, optimizer)
        strength = self.lam * scale if self.coupling == "gradient" else None
        self._penalty.update(trainer.global_step, strength)
        # At least once per epoch, or Lightning would show the last epoch's value.
        if trainer.global_step % SAMPLED_EVERY_N_STEPS == 0 or not self._zero_gradient_shares:
            self._zero_gradient_shares.append(_zero_gradient_share(self._penalty.parameters()))
        if self._push.is_due(trainer.global_step):
            self._push.sample(self._penalty.gradients(), lam=self.lam, gradient_scale=scale)
        if self.lam == 0:
            return
        apply_penalty(
            self._penalty.gradients(),
            optimizer,
            lam=self.lam,
            coupling=self.coupling,
            gradient_scale=scale,
        )
        self._deferred_steps += 1

    def _apply_deferred_steps(self, penalty: Penalty) -> None:
        """Apply the deferred optimiser steps of alpha and the layer weights.

        Nothing reads these weights before the next factors, and the norms that they learn from stay
        the same until then. Made in a row, the steps take a third of the time that they would take
        spread over the training, each with cold caches.
        """
        if self._optimizer is not None:
            for _ in range(self._deferred_steps):
                penalty.set_gradients_of_weights(scale=self.lam)
                self._optimizer.step()
        self._deferred_steps = 0

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._penalty is None:
            _measure_without_penalty(trainer, pl_module)
            return
        is_due = (trainer.current_epoch + 1) % self.spectra_every == 0
        exact = is_due or self.refresh_every == 1
        spectra = self._measure(self._penalty, trainer.global_step, exact=exact)
        norms = self._penalty.norms()
        layer_weights = self._penalty.weights.layer_weights(norms)
        alpha = self._penalty.weights.alpha()
        penalty = self.lam * (layer_weights @ norms)
        values = {"norm": layer_weights @ norms, "penalty": penalty, **self._push.pop()}
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            values["loss_share"] = loss_share(penalty, loss)
        if self._zero_gradient_shares:
            shares = torch.stack(self._zero_gradient_shares)
            values["zero_gradient_share"] = shares.mean()
        deviations = self._penalty.pop_deviations()
        names = self._unfolding_names()
        logged = {f"mtn/{name}": value for name, value in values.items()}
        for index, depth in enumerate(self._penalty.depths):
            layer_values = {
                "norm": norms[index],
                "weight": layer_weights[index],
                "distance": mean_distance(self._penalty.stack(depth)),
            }
            if deviations is not None:
                self._warn_of_deviation(depth, deviations[index].gap)
                found = deviations[index]._asdict()
                layer_values |= {name: torch.tensor(value) for name, value in found.items()}
            for unfolding, name in enumerate(names):
                layer_values[f"effective_rank_{name}"] = effective_rank(spectra[index][unfolding])
            layer_values |= self._alphas(alpha[index])
            logged |= {layer_key(depth, name): value for name, value in layer_values.items()}
            self._warn_of_collapse(depth, alpha[index])
        # Several processes average the values on the model's device.
        on_device = {name: value.float().to(pl_module.device) for name, value in logged.items()}
        pl_module.log_dict(on_device, sync_dist=True)
        self._zero_gradient_shares.clear()
        if trainer.is_global_zero:
            named = {
                f"layer_{depth}/{name}": spectrum.numpy()
                for depth, layer_spectra in zip(self._penalty.depths, spectra, strict=True)
                for name, spectrum in zip(names, layer_spectra, strict=True)
            }
            _write_spectra(trainer, named)

    def _alphas(self, alpha: Tensor) -> dict[str, Tensor]:
        """Return the alphas of a layer to log; none under ``nuclear``, which has no unfoldings."""
        if self.norm == "nuclear":
            return {}
        names = self._unfolding_names()
        return {f"alpha_{name}": alpha[index] for index, name in enumerate(names)}

    def _unfolding_names(self) -> tuple[str, ...]:
        return UNFOLDINGS if self.target == "towers" else ("expert", *UNFOLDINGS[1:])

    def _warn_of_deviation(self, depth: int, gap: float) -> None:
        if gap <= _LARGEST_GAP or depth in self._deviated:
            return
        self._deviated.add(depth)
        _logger.warning(
            "mtn: between two updates the norm of layer %d was up to %.0f %% off, so its logged "
            "figures differ from those of the exact method. Set mtn.refresh_every below %d; 1 is "
            "the exact method.",
            depth,
            100 * gap,
            self.refresh_every,
        )

    def _warn_of_collapse(self, depth: int, alpha: Tensor) -> None:
        largest = alpha.max().item()
        if self.alpha != "learned" or largest <= COLLAPSED_ALPHA or depth in self._collapsed:
            return
        self._collapsed.add(depth)
        name = self._unfolding_names()[int(alpha.argmax())]
        _logger.warning(
            "alpha of layer %d has collapsed: the %s unfolding has weight %.4f, so the tensor "
            "trace norm is nearly that of one matrix. Set mtn.alpha=uniform to keep them all.",
            depth,
            name,
            largest,
        )


def measure_spectra(network: Any) -> dict[str, np.ndarray]:
    """Return the spectra of the layers that MTN can penalise, without penalising them.

    Returns:
        Descending singular values by ``layer_<depth>/<unfolding>`` (towers) and
        ``shared_<depth>/<unfolding>`` (experts). Layers without a parallel one of equal shape, and
        those whose weights are not finite, are left out.
    """
    found = {}
    for place, method, first in (
        ("layer", "task_layers", UNFOLDINGS[0]),
        ("shared", "shared_layers", "expert"),
    ):
        for depth, layers in enumerate(getattr(network, method, list)()):
            weights = [layer.weight.detach() for layer in layers]
            if len(weights) < 2 or len({weight.shape for weight in weights}) > 1:
                continue
            stack = torch.stack(weights).cpu()
            stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
            if stack.isfinite().all():
                names = (first, *UNFOLDINGS[1:])
                for name, spectrum in zip(names, unfolding_spectra(stack), strict=True):
                    found[f"{place}_{depth}/{name}"] = spectrum.numpy()
    return found


def _measure_without_penalty(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    if trainer.is_global_zero:
        _write_spectra(trainer, measure_spectra(getattr(pl_module, "network", None)))


def _write_spectra(trainer: L.Trainer, spectra: dict[str, np.ndarray]) -> None:
    if not spectra:
        return
    folder = Path(trainer.default_root_dir) / "spectra"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"epoch_{trainer.current_epoch:03d}.npz", **cast(Any, spectra))


def _zero_gradient_share(parameters: Sequence[nn.Parameter]) -> Tensor:
    nonzero = [p.grad.count_nonzero() for p in parameters if p.grad is not None]
    total = sum(p.numel() for p in parameters)
    return 1 - (torch.stack(nonzero).sum() if nonzero else torch.tensor(0)) / total


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, str):
        check_choice("mtn.alpha", alpha, ["learned", "uniform"])
        return
    if not isinstance(alpha, Sequence) or len(alpha) != len(UNFOLDINGS):
        raise InputError(
            "mtn.alpha must be `learned`, `uniform` or three weights (of the task, output and "
            f"input unfolding), got {alpha!r}"
        )
    for weight in alpha:
        check_number("mtn.alpha", weight, minimum=0, maximum=1)
    if not math.isclose(sum(alpha), 1, abs_tol=1e-6):
        raise InputError(f"mtn.alpha must sum to 1, got {list(alpha)} with sum {sum(alpha):g}")


def _check_norm(norm: str, alpha: Any, subsets: str, refresh_every: int) -> None:
    if norm == "capped" and refresh_every != 1:
        raise InputError(
            "mtn.refresh_every must be 1 with mtn.norm=capped, which is not convex, so a direction "
            f"that is kept may point anywhere, got {refresh_every}. Set mtn.refresh_every=1."
        )
    if norm == "nuclear" and (alpha != "uniform" or subsets != "distinct"):
        raise InputError(
            "mtn.alpha must be uniform and mtn.subsets distinct with mtn.norm=nuclear, which has "
            f"no unfoldings to weight, got {alpha} and {subsets}. Choose mtn=nuclear."
        )
