"""Adam for embedding tables that are too large to update in full at every step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.adam import adam

from mtnrec.checks import InputError, check_number


class LazyAdam(Adam):
    """Adam that updates only the rows of a sparse gradient, both weights and moments.

    A row in every batch, and a parameter with a dense gradient, move as under
    ``torch.optim.Adam(fused=True)``, whose kernel does the step. A row that is not in a batch keeps
    its exact bits; under Adam its moments decay and keep moving it. The bias correction counts the
    steps of the table, as ``torch.optim.SparseAdam`` does, not those of the row: late in training a
    row in a single batch moves by ``lr * (1 - beta1) / sqrt(1 - beta2)``, 3.2 ``lr`` with the usual
    betas, and under Adam by ten times that over the steps that follow.

    Weight decay acts the same way: a row decays at the steps whose batch has it, so that its decay
    keeps the ratio to its data gradient that it has under Adam, and rows that are absent keep their
    bits. Under Adam the gradient of an absent row is its decay alone, which Adam magnifies until
    the row vanishes.

    The cost of a step depends on the batch, not on the size of the table. The state is Adam's, two
    values per weight.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, in [0, 1).
        eps: Term added to the denominator, at least 0.
        weight_decay: L2 strength, at least 0: ``weight_decay`` times the weight is added to the
            gradient, as in ``torch.optim.Adam``; it is not decoupled.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("lr", lr, minimum=0)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise InputError(f"betas must be a list of two numbers, got {betas!r}")
        for beta in betas:
            check_number("betas", beta, minimum=0, maximum=1, open_maximum=True)
        check_number("eps", eps, minimum=0)
        check_number("weight_decay", weight_decay, minimum=0)
        first, second = map(float, betas)
        super().__init__(
            params, lr=lr, betas=(first, second), eps=eps, weight_decay=weight_decay, fused=True
        )
        # Otherwise fp16 gradients would stay scaled until the step and could not be clipped.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        operands: list[list[Tensor]] = []
        steps: list[Tensor] = []
        copies: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self._get_state(parameter)
            steps.append(state["step"])
            stored = [parameter, state["exp_avg"], state["exp_avg_sq"]]
            if not gradient.is_sparse:
                operands.append([gradient, *stored])
                continue
            gradient = gradient.coalesce()
            rows = gradient.indices()[0]
            copied = [tensor.index_select(0, rows) for tensor in stored]
            operands.append([gradient.values(), *copied])
            copies.append((rows, stored, copied))
        if not operands:
            return
        gradients, weights, means, squares = map(list, zip(*operands, strict=True))
        adam(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for rows, stored, copied in copies:
            for tensor, copy in zip(stored, copied, strict=True):
                tensor.index_copy_(0, rows, copy)

    def _get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:  # same keys and initial values as Adam
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def gradients_to_clip(self) -> Optimizer:
        """Return an optimiser over all gradients in dense form, for clipping.

        torch cannot clip sparse gradients. Each is represented by the gradients of its rows, which
        share its memory: clipping them clips it.
        """
        stand_ins: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                stand_in = parameter
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                    stand_in = parameter.grad.values().detach()
                    stand_in.grad = parameter.grad.values()
                stand_ins.append(stand_in)
        return SGD(stand_ins)
