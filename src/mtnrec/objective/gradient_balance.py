"""Balances that join the gradients of the losses instead of the losses."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from mtnrec.arrays import BoolArray, Float64Array
from mtnrec.checks import InputError, check_choice, check_number
from mtnrec.objective.balance import check_several
from mtnrec.objective.gramian import METHODS, find_weights

_Gradients = list[tuple[Tensor | None, ...]]  # of each loss, for each parameter


class GradientBalance(nn.Module):
    """Weights the losses in the shared parameters by the Gramian of their gradients.

    Shared are the parameters in which at least two losses have a gradient other than zero; the
    Gramian is summed over them. The other parameters get the gradient of their loss as it is.

    Each loss needs its own backward pass: with two losses a step takes about 1.7 times as long, and
    a copy of the gradients per loss takes memory.

    Args:
        method: ``pcgrad``, ``imtl_g``, ``mgda``, ``cagrad`` or ``aligned_mtl``; see
            :mod:`mtnrec.objective.gramian`.
        c: Radius of ``cagrad``, relative to the mean gradient; at least 0 and below 1.

    Raises:
        InputError: If a value is out of range, or, in :meth:`prepare`, if there is a single loss.
    """

    def __init__(self, method: str, *, c: float = 0.4) -> None:
        super().__init__()
        check_choice("balance.method", method, METHODS)
        check_number("balance.c", c, minimum=0, maximum=1, open_maximum=True)
        self.method, self.c = method, c
        self.measured: dict[str, Tensor] = {}

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Check that there are several losses."""
        check_several(self.method, names)
        self._names = tuple(names)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the losses, ``(K,)``."""
        return losses

    def backward(
        self, scale: Tensor, losses: Tensor, parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Add the joint gradient, times ``scale``, to the parameters."""
        trained = _trained(parameters)
        gradients = _gradients(scale, losses, trained)
        gramians = _gramians(gradients)
        shared = _shared(gramians)
        weights = find_weights(self.method, gramians[shared].sum(axis=0), c=self.c)
        _add(trained, gradients, np.where(shared[:, None], weights, 1))
        self.measured = _measure(self._names, gramians, _parts(parameters))
        for name, weight in zip(self._names, weights, strict=True):
            self.measured[f"weight_{name}"] = torch.tensor(float(weight))


class MetaBalance(nn.Module):
    """Brings the gradients of the other losses closer to the norm of the main one's, per parameter.

    With ``m`` the moving average of the norms, a gradient is multiplied by
    ``r m_main / m + 1 - r`` (He et al., WWW 2022). Parameters without a gradient of the main loss
    are left as they are. The cost is that of :class:`GradientBalance`.

    Args:
        main: Name of the main loss; None is the last one, a funnel's conversion unless the network
            has losses of its own.
        r: Share of the step to the main loss's norm, from 0 (the plain sum) to 1.
        beta: Decay of the moving average, in [0, 1).

    Raises:
        InputError: If a value is out of range, or, in :meth:`prepare`, if there is a single loss
            or no loss ``main``.
    """

    norms: Tensor

    def __init__(self, *, main: str | None = None, r: float = 0.7, beta: float = 0.9) -> None:
        super().__init__()
        check_number("balance.r", r, minimum=0, maximum=1)
        check_number("balance.beta", beta, minimum=0, maximum=1, open_maximum=True)
        self.main, self.r, self.beta = main, r, beta
        self.measured: dict[str, Tensor] = {}

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Check that the main loss exists, and make the averages of the norms."""
        check_several("metabalance", names)
        if self.main is not None and self.main not in names:
            raise InputError(
                f"balance.main must be a loss of the model ({', '.join(names)}), got {self.main!r}"
            )
        self._names = tuple(names)
        self._main = len(names) - 1 if self.main is None else self._names.index(self.main)
        count = sum(map(len, parameters.values()))
        self.register_buffer("norms", torch.zeros(count, len(names)))

    def forward(self, losses: Tensor) -> Tensor:
        """Return the losses, ``(K,)``."""
        return losses

    def backward(
        self, scale: Tensor, losses: Tensor, parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Add the joint gradient, times ``scale``, to the parameters."""
        trained = _trained(parameters)
        gradients = _gradients(scale, losses, trained)
        gramians = _gramians(gradients)
        means = self._average(np.sqrt(_diagonals(gramians)) / scale.item(), parameters)
        ratios = np.divide(
            means[:, [self._main]],
            means,
            out=np.ones_like(means),
            where=(means > 0) & (means[:, [self._main]] > 0),
        )
        _add(trained, gradients, 1 + self.r * (ratios - 1))
        self.measured = _measure(self._names, gramians, _parts(parameters))

    def _average(
        self, norms: Float64Array, parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> Float64Array:
        """Return the moving averages of the trained parameters, ``(P, K)``."""
        flags = [p.requires_grad for part in parameters.values() for p in part]
        trained = torch.tensor(flags, device=self.norms.device)
        found = torch.from_numpy(norms).to(self.norms)
        self.norms[trained] = torch.lerp(found, self.norms[trained], self.beta)
        means: Float64Array = self.norms[trained].double().cpu().numpy()
        return means


def _trained(parameters: Mapping[str, Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    return [p for part in parameters.values() for p in part if p.requires_grad]


def _parts(parameters: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, slice]:
    """Return the places of each part's parameters among the trained ones."""
    found, start = {}, 0
    for name, part in parameters.items():
        stop = start + sum(p.requires_grad for p in part)
        if stop > start:
            found[name] = slice(start, stop)
        start = stop
    return found


def _gradients(scale: Tensor, losses: Tensor, parameters: Sequence[nn.Parameter]) -> _Gradients:
    last = len(losses) - 1
    return [
        torch.autograd.grad(loss, parameters, scale, retain_graph=k < last, allow_unused=True)
        for k, loss in enumerate(losses.unbind())
    ]


def _gramians(gradients: _Gradients) -> Float64Array:
    """Return the Gramian of each parameter, ``(P, K, K)``; zeros if one is not finite.

    Then the gradients have NaN or infinity with any weights, for the loss scaler or the check of
    divergence to find.
    """
    count = len(gradients)
    zero = next(g for own in gradients for g in own if g is not None).new_zeros(())
    zero = zero.to(torch.promote_types(zero.dtype, torch.float32))
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    products = [
        [_product(own[i], own[j], zero) for i, j in pairs] for own in zip(*gradients, strict=True)
    ]
    flat = torch.stack([torch.stack(row) for row in products]).cpu().double().numpy()
    gramians = np.zeros((len(flat), count, count))
    if np.isfinite(flat).all():
        for place, (i, j) in enumerate(pairs):
            gramians[:, i, j] = gramians[:, j, i] = flat[:, place]
    return gramians


def _product(one: Tensor | None, other: Tensor | None, zero: Tensor) -> Tensor:
    if one is None or other is None:
        return zero
    wide = torch.promote_types(one.dtype, torch.float32)
    return one.flatten().to(wide) @ other.flatten().to(wide)


def _diagonals(gramians: Float64Array) -> Float64Array:
    """Return the squared norms of the gradients, ``(P, K)``."""
    squares: Float64Array = gramians.diagonal(axis1=1, axis2=2)
    return squares


def _shared(gramians: Float64Array) -> BoolArray:
    """Return which parameters several losses reach, ``(P,)``.

    Networks compute their towers together, so that a loss has a gradient of zeros in the other
    towers.
    """
    shared: BoolArray = (_diagonals(gramians) > 0).sum(axis=1) >= 2
    return shared


def _add(parameters: Sequence[nn.Parameter], gradients: _Gradients, weights: Float64Array) -> None:
    """Add the sum of the weighted gradients, weights ``(P, K)``, to those of the parameters."""
    for parameter, own, row in zip(
        parameters, zip(*gradients, strict=True), weights.tolist(), strict=True
    ):
        for gradient, weight in zip(own, row, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                # A copy in the parameter's layout: autograd may return one tensor for several
                # parameters, or a transposed one, which fused optimisers would misread.
                parameter.grad = torch.mul(gradient, weight, out=torch.empty_like(parameter))
            else:
                parameter.grad.add_(gradient, alpha=weight)


def _measure(
    names: Sequence[str], gramians: Float64Array, parts: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Return cosine and ratio of norms of each pair of losses, and whether a pair conflicts.

    They are those of the shared parameters; the cosine also by part.
    """
    shared = _shared(gramians)
    total = gramians[shared].sum(axis=0)
    by_part = {f"_{name}": gramians[at][shared[at]].sum(axis=0) for name, at in parts.items()}
    found = {"conflict": float((total < 0).any())}
    for i, j in combinations(range(len(names)), 2):
        pair = f"{names[i]}_{names[j]}"
        for part, gramian in {"": total, **by_part}.items():
            lengths = np.sqrt(gramian[i, i] * gramian[j, j])
            found[f"cos{part}_{pair}"] = gramian[i, j] / lengths if lengths else 0.0
        found[f"norm_ratio_{pair}"] = np.sqrt(total[i, i] / total[j, j]) if total[j, j] else 0.0
    return {name: torch.tensor(float(value)) for name, value in found.items()}
