"""ESMM (X. Ma et al., Entire Space Multi-Task Model, SIGIR 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError, check_flag, check_integer, check_number
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import funnel_log_probabilities, label_log_probabilities
from mtnrec.model.loss import require_labels, row_cross_entropies
from mtnrec.model.mixture import MOST_EXPERTS, linear_layers, mix_experts
from mtnrec.model.mlp import ParallelMLPs, check_sizes, init_towers
from mtnrec.schema import Schema


class ESMM(nn.Module):
    """Shared embeddings, a CTR tower and a CVR tower; ``pCTCVR = pCTR * pCVR``.

    CVR has no separate loss: both losses are over all impressions. A funnel of more stages has a
    tower for each label given the one before it, and the probabilities are their products.

    With ``experts`` the towers read MMoE's mixtures in place of the embeddings. The three last keys
    are ablations and controls of debiasing, for two labels; without them the network is ESMM.

    Args:
        schema: Fields and labels of the data, which must be a funnel.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        cross_layers: Number of layers of a :class:`~mtnrec.model.cross.CrossNetwork` on the input;
            0 for none.
        cross_rank: Rank of its matrices.
        experts: Number of shared experts, ``E``; 0 for towers on the embeddings.
        expert_widths: Output widths of each expert's layers.
        tower_widths: Output widths of each tower's hidden layers, which comprise the bottom and
            tower of other models.
        tower_init: ``independent``, or ``equal`` as in :func:`~mtnrec.model.mlp.init_towers`.
        dropout: Dropout probability in [0, 1); the paper uses 0.
        batch_norm: Whether to use batch norm; the paper does not.
        clicked_weight: Weight of one more loss: the cross entropies of CVR on clicked rows, summed
            and divided by ``B``.
        unclicked_weight: Weight of unclicked rows in the loss of CTCVR, in [0, 1].
        click_gate: Whether the last hidden units of the CVR tower are multiplied by
            ``2 sigmoid(G h)``, where ``h`` are those of the CTR tower without a gradient, and the
            square matrix ``G`` starts at zero.

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
        cross_layers: int = 0,
        cross_rank: int = 64,
        experts: int = 0,
        expert_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (512, 256, 128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
        clicked_weight: float = 0.0,
        unclicked_weight: float = 1.0,
        click_gate: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=0, maximum=MOST_EXPERTS)
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            expert_widths=expert_widths,
            tower_widths=tower_widths,
        )
        check_number("model.clicked_weight", clicked_weight, minimum=0)
        check_number("model.unclicked_weight", unclicked_weight, minimum=0, maximum=1)
        check_flag("model.click_gate", click_gate)
        if clicked_weight or unclicked_weight != 1 or click_gate:
            name = "ESMM with clicked_weight, unclicked_weight or click_gate"
            check_funnel(name, schema, two_labels=True)
        check_funnel(type(self).__name__, schema)
        self.labels = schema.labels
        self.input = FeatureInput(
            schema,
            embedding_dim,
            bag_mode,
            embedding_init,
            cross_layers=cross_layers,
            cross_rank=cross_rank,
        )
        width = self.input.out_features
        self.experts: ParallelMLPs | None = None
        if experts:
            self.experts = ParallelMLPs(
                experts, width, expert_widths, dropout=dropout, batch_norm=batch_norm
            )
            self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
            self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in schema.labels)
            width = expert_widths[-1]
        self.towers = ParallelMLPs(
            len(schema.labels),
            width,
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)
        self.click_gate: nn.Linear | None = None
        if click_gate:
            self.click_gate = nn.Linear(tower_widths[-1], tower_widths[-1], bias=False)
            nn.init.zeros_(self.click_gate.weight)
        if clicked_weight or unclicked_weight != 1:
            click, conversion = schema.labels
            self.loss_weights = {
                click: 1.0,
                conversion: unclicked_weight,
                "clicked_ctcvr": 1 - unclicked_weight,
                "clicked_cvr": clicked_weight,
            }

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        logits = self.logits(batch).unbind()
        return funnel_log_probabilities(*logits[: len(self.labels)])

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the labels and of any further head, ``(T or more, B, 1)``."""
        hidden = self.last_hidden(batch)
        if self.click_gate is not None:
            click, conversion = hidden
            gate = 2 * self.click_gate(click.detach()).sigmoid()
            hidden = torch.stack([click, conversion * gate])
        return self.towers.apply_slice(hidden, -1, None)

    def last_hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden units of the towers, ``(T or more, B, O)``."""
        if self.experts is None:
            (hidden,) = self.input.first_layers(batch, self.towers.first_layers())
            return self.towers.apply_slice(hidden, 1, -1)
        gates = linear_layers(self.gates)
        hidden, logits = self.input.first_layers(batch, self.experts.first_layers(), gates)
        experts = self.experts.after_first_layer(hidden)  # (E, B, O)
        experts = self.expert_outputs(experts.transpose(0, 1))  # (B, E, O)
        return self.towers.apply_slice(mix_experts(experts, logits), None, -1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the labels' cross entropies, and those of CTCVR and CVR on clicked rows.

        The last two are divided by ``B``, not by the clicks.
        """
        labels = require_labels(batch)
        click, conversion = self.logits(batch)
        rows = row_cross_entropies(funnel_log_probabilities(click, conversion), labels)
        clicks = labels[:, 0]
        return dict(zip(self.labels, rows.mean(dim=0), strict=True)) | {
            "clicked_ctcvr": (clicks * rows[:, 1]).mean(),
            "clicked_cvr": (clicks * logit_cross_entropies(conversion, labels[:, 1])).mean(),
        }

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the ``E`` linear layers; empty without experts."""
        return [] if self.experts is None else self.experts.by_depth()


def logit_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each row, ``(B,)``.

    Args:
        logits: Log-odds, ``(B, 1)``.
        labels: Any numbers, ``(B,)``.
    """
    output = label_log_probabilities(logits.unsqueeze(0))
    return row_cross_entropies(output, labels.unsqueeze(1)).squeeze(1)


def check_funnel(name: str, schema: Schema, *, two_labels: bool = False) -> None:
    """Check that the labels are a funnel, of two labels if the model knows only clicks.

    Raises:
        InputError: If they are not.
    """
    if not schema.funnel or (two_labels and len(schema.labels) != 2):
        rule = (
            "of two labels, click and conversion" if two_labels else "such as click and conversion"
        )
        kind = "stages" if schema.funnel else "independent labels"
        raise InputError(
            f"{name} needs a funnel {rule}, got the {kind} {', '.join(schema.labels)}. Choose "
            "model=shared_bottom or model=mmoe."
        )
