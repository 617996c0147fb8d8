"""AITM (D. Xi et al., Adaptive Information Transfer Multi-task, KDD 2021)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import check_number
from mtnrec.model.esmm import check_funnel
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.loss import cross_entropies, require_labels
from mtnrec.model.mlp import ParallelMLPs, check_sizes, init_towers
from mtnrec.schema import Schema


class AITM(nn.Module):
    """A tower per label of a funnel; each stage receives what the stage before it has learned.

    The first stage's state is its tower's output. That of a later stage is an attention over two
    tokens, the state before it and its own tower's output; see ``Transfer``. The towers are
    CTR and CTCVR, or one for each stage; CVR is their quotient (paper, eq. 1). A further loss,
    ``calibrator``, is the function ``calibrator``.

    Args:
        schema: Fields and labels of the data, which must be a funnel.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        tower_widths: Output widths of each tower's layers before the attention.
        head_widths: Output widths of each tower's layers between the attention and the logit. None
            in the authors' code; MTReclib's attention is on the bottoms, ``[512, 256]``, and
            ``[128, 64]`` follow.
        tower_init: ``independent``, or ``equal`` as in :func:`~mtnrec.model.mlp.init_towers`.
        calibrator_weight: Weight of the calibrator.
        dropout: Dropout probability in [0, 1); the paper uses 0.
        batch_norm: Whether to use batch norm; the paper does not.

    Raises:
        InputError: If the labels are not a funnel, or a value is out of range.
    """

    supports_cuda_graphs = True

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int | Mapping[Any, int] = 128,
        embedding_init: str = "joint",
        bag_mode: str = "mean",
        tower_widths: Sequence[int] = (512, 256, 128, 64),
        head_widths: Sequence[int] = (),
        tower_init: str = "independent",
        calibrator_weight: float = 0.6,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_funnel("AITM", schema)
        widths = {"tower_widths": tower_widths, "head_widths": head_widths}
        if head_widths in ((), []):
            del widths["head_widths"]
        check_sizes(dropout=dropout, batch_norm=batch_norm, **widths)
        check_number("model.calibrator_weight", calibrator_weight, minimum=0)
        stages, width = len(schema.labels), tower_widths[-1]
        self.labels = schema.labels
        self.loss_weights = {**dict.fromkeys(schema.labels, 1.0), "calibrator": calibrator_weight}
        self.measured: dict[str, Tensor] = {}
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        self.towers = ParallelMLPs(
            stages, self.input.out_features, tower_widths, dropout=dropout, batch_norm=batch_norm
        )
        self.transfers = nn.ModuleList(Transfer(width, dropout) for _ in range(stages - 1))
        self.heads = ParallelMLPs(
            stages, width, head_widths, dropout=dropout, batch_norm=batch_norm, head=True
        )
        init_towers(self.task_layers(), tower_init)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        (hidden,) = self.input.first_layers(batch, self.towers.first_layers())
        state, *own = self.towers.after_first_layer(hidden)
        states = [state]
        for transfer, tower in zip(self.transfers, own, strict=True):
            states.append(transfer(states[-1], tower))
        return label_log_probabilities(self.heads(torch.stack(states)))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the labels' cross entropies and the calibrator.

        Measures ``violating_share``, the share of rows at which a stage is more probable than the
        one before it; no other row has a gradient of the calibrator.
        """
        labels, output = require_labels(batch), self(batch)
        violating = (output.positive.detach().diff(dim=1) > 0).any(dim=1)
        self.measured = {"violating_share": violating.float().mean()}
        return dict(zip(self.labels, cross_entropies(output, labels), strict=True)) | {
            "calibrator": calibrator(output)
        }

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers and heads, the ``T`` linear layers."""
        return [*self.towers.by_depth(), *self.heads.by_depth()]

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return an empty list: only the embeddings are shared."""
        return []


class Transfer(nn.Module):
    """Attention of a stage over the state of the stage before it and the output of its own tower.

    The weight of a token is the softmax of ``<query, key> / sqrt(O)``, both of that token.

    Args:
        width: ``O``, of both tokens and of the output.
        dropout: Dropout probability of the transferred token, in [0, 1).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.transfer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Linear(width, 3 * width, bias=False)  # queries, keys, values

    def forward(self, state: Tensor, own: Tensor) -> Tensor:
        """Return the state of the stage, ``(B, O)``, from that before it and its tower's output."""
        transferred = self.dropout(self.transfer(state).relu())
        tokens = torch.stack([transferred, own])  # (2, B, O)
        queries, keys, values = self.attention(tokens).chunk(3, dim=2)
        scores = (queries * keys).sum(dim=2, keepdim=True) / math.sqrt(own.shape[1])
        return (scores.softmax(dim=0) * values).sum(dim=0)


def calibrator(output: LogProbabilities) -> Tensor:
    """Return the mean over rows of ``sum_t max(p_t - p_(t-1), 0)``, a scalar.

    Args:
        output: Log-probabilities of the stages in order, ``(B, T)`` each.
    """
    # The gradient of relu, unlike that of clamp, is zero at zero.
    return output.positive.exp().diff(dim=1).relu().sum(dim=1).mean()
