"""Objective of a network: its losses, balanced and reduced to one number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.checks import InputError, check_choice
from mtnrec.model.loss import cross_entropies, require_labels
from mtnrec.model.network import split_parameters
from mtnrec.objective.balance import Weights, weigh
from mtnrec.objective.loss import CrossEntropy

TASK_LOSSES = ("sum", "mean")


class Objective(nn.Module):
    """Computes what training minimises, and the values that it logs.

    Args:
        network: A :class:`~mtnrec.model.network.Network`; only its ``loss_weights`` are kept.
        labels: Names of the labels.
        loss: A :class:`~mtnrec.objective.loss.Loss`; the cross entropy by default.
        balance: A :class:`~mtnrec.objective.balance.Balance`; the plain sum by default.
        task_loss: ``sum`` or ``mean`` of the losses.

    Raises:
        InputError: If ``loss`` is not the cross entropy for a network with its own losses, or the
            balance does not fit the losses.
    """

    loss: Any  # a Loss and a Balance, which nn.Module would type as modules
    balance: Any

    def __init__(
        self,
        network: nn.Module,
        labels: Sequence[str],
        *,
        loss: Any = None,
        balance: Any = None,
        task_loss: str = "sum",
    ) -> None:
        super().__init__()
        check_choice("task_loss", task_loss, TASK_LOSSES)
        self.loss = CrossEntropy() if loss is None else loss
        self.balance = Weights() if balance is None else balance
        weights = getattr(network, "loss_weights", None)
        if weights is not None and not isinstance(self.loss, CrossEntropy):
            raise InputError(
                f"loss must be cross_entropy for {type(network).__name__}, which has its own "
                f"losses, got {type(self.loss).__name__}. Choose loss=cross_entropy."
            )
        self.names = tuple(labels if weights is None else weights)
        self.value_names: list[str] = []
        self._places = None if weights is None else [self.names.index(label) for label in labels]
        values = [] if weights is None else [float(weight) for weight in weights.values()]
        self._weights = values if any(value != 1 for value in values) else None
        self._reduce = torch.sum if task_loss == "sum" else torch.mean
        self._terms: Tensor | None = None
        if hasattr(self.loss, "prepare"):
            self.loss.prepare(tuple(labels))
        self.balance.prepare(self.names, _parameters(network))
        by_value = not (self.has_fixed_balance or self.is_balanced_by_gradients)
        absent = [name for name, value in zip(self.names, values, strict=False) if not value]
        if by_value and absent:  # the logarithm of such a loss has no bound
            raise InputError(
                f"balance={type(self.balance).__name__} needs losses of weights above 0, got "
                f"weight 0 for {', '.join(absent)} of {type(network).__name__}. Choose "
                "balance=sum, or a balance of gradients."
            )

    @property
    def is_balanced_by_gradients(self) -> bool:
        """Whether the balance computes the gradients itself."""
        return hasattr(self.balance, "backward")

    @property
    def is_adapted_after_steps(self) -> bool:
        """Whether the balance asks for the losses after each optimiser step."""
        return hasattr(self.balance, "after_step")

    @property
    def has_fixed_balance(self) -> bool:
        """Whether the balance has neither parameters nor state, as a captured step needs."""
        learns = any(True for _ in self.balance.parameters())
        return not (learns or self.is_balanced_by_gradients or self.is_adapted_after_steps)

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether a step can be captured, as far as loss and balance go."""
        return getattr(self.loss, "supports_cuda_graphs", False) and self.has_fixed_balance

    def forward(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the objective, followed by the values to log, ``(1 + len(value_names),)``.

        The values have no gradient: ``loss``, the sum or mean of the cross entropies, ``loss_name``
        of each loss, and what network, loss and balance measured; a balance of gradients measures
        in :meth:`backward`.
        """
        losses, entropies = self.losses(network, batch)
        terms = self._weighted(losses)
        balanced = self.balance(terms)
        objective = self._reduce(balanced)
        parts = [network, self.loss]
        if self.is_balanced_by_gradients:
            self._terms = balanced
        else:
            parts.append(self.balance)
        measured = {k: v for part in parts for k, v in getattr(part, "measured", {}).items()}
        self.value_names = ["loss", *(f"loss_{name}" for name in self.names), *measured]
        values = [self._reduce(entropies), losses, *measured.values()]
        flat = [value.detach().reshape(-1).to(objective.dtype) for value in values]
        return torch.cat([objective.reshape(1), *flat])

    def losses(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the unweighted losses, ``(K,)``, and the labels' cross entropies, ``(T,)``."""
        if self._places is not None:
            named = network.losses(batch)  # type: ignore[operator]
            if tuple(named) != self.names:
                raise ValueError(f"losses() has {tuple(named)}, loss_weights has {self.names}")
            losses = torch.stack(list(named.values()))
            return losses, losses[self._places]
        labels = require_labels(batch)
        output = network(batch)
        losses = self.loss(output, labels)
        if isinstance(self.loss, CrossEntropy):
            return losses, losses
        with torch.no_grad():
            return losses, cross_entropies(output, labels)

    def backward(self, network: nn.Module, objective: Tensor) -> Tensor:
        """Let the balance add its gradients for the last batch; return more values to log.

        Args:
            network: The network.
            objective: The objective as Lightning scaled it, for AMP and accumulation.
        """
        assert self._terms is not None
        terms, self._terms = self._terms, None
        # The same for each term: of the sum or mean, the accumulation and the loss scaler.
        (scales,) = torch.autograd.grad(objective, terms)
        self.balance.backward(scales[0], terms, _parameters(network))
        measured = getattr(self.balance, "measured", {})
        self.value_names += measured
        return torch.tensor([float(value) for value in measured.values()]).to(objective)

    @torch.no_grad()
    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """Tell the balance the losses of the batch after the step.

        Buffers of the network, for example batch norm's statistics, stay as the step left them.
        """
        buffers = list(network.buffers())
        before = [buffer.clone() for buffer in buffers]
        self.loss.eval()  # it has counted this batch
        losses, _ = self.losses(network, batch)
        self.loss.train()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        self.balance.after_step(self._weighted(losses))

    def _weighted(self, losses: Tensor) -> Tensor:
        return losses if self._weights is None else weigh(losses, self._weights)


def _parameters(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the network's parameters: ``embeddings`` and ``layers``."""
    parts = split_parameters(network)
    return {"embeddings": parts["embeddings"], "layers": parts["network"]}
