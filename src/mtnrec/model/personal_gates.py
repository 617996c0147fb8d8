"""PPNet's gates of the towers (J. Chang et al., PEPNet, KDD 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.model.feature_input import FeatureInput, find_fields
from mtnrec.model.mlp import apply_together
from mtnrec.schema import Schema


class PersonalGates(nn.Module):
    """A gate per tower and hidden layer, ``2 sigmoid(W_2 relu(W_1 [p; x]))``.

    The hidden units of the layer, after their ReLU, are multiplied by it. ``p`` are the vectors of
    the personal fields, ``x`` the input of the tower without a gradient. The paper's ``x`` is the
    input of the whole network; with it the gates of MMoE would have four times as many parameters.
    With ``W_2 = 0`` and no bias the gates are 1.

    Args:
        schema: Fields and labels of the data; one tower per label.
        features: Input of the network, which holds the fields' tables.
        personal_fields: Names of the fields.
        width: Columns of a tower's input.
        tower_widths: Output widths of the towers' hidden layers, and of the gates' own ones.

    Raises:
        InputError: If the data lacks a field.
    """

    def __init__(
        self,
        schema: Schema,
        features: FeatureInput,
        personal_fields: Any,
        width: int,
        tower_widths: Sequence[int],
    ) -> None:
        super().__init__()
        self._fields = find_fields(schema, "model.personal_fields", personal_fields)
        inputs = sum(features.width(field) for field in self._fields) + width
        towers = len(schema.labels)
        self.hidden = nn.ModuleList(_layers(towers, inputs, units) for units in tower_widths)
        self.outputs = nn.ModuleList(_layers(towers, units, units) for units in tower_widths)

    def forward(self, features: FeatureInput, batch: Batch, inputs: Tensor) -> list[Tensor]:
        """Return the gates of each hidden layer, ``(T, B, O)`` each.

        Args:
            features: Input of the network.
            batch: ``B`` rows.
            inputs: Inputs of the towers, ``(T, B, I)``.
        """
        personal = torch.cat([features.vector(batch, field) for field in self._fields], dim=1)
        personal = personal.expand(len(inputs), -1, -1)
        columns = torch.cat([personal, inputs.detach()], dim=2)
        return [
            2 * _apply(outputs, _apply(hidden, columns).relu()).sigmoid()
            for hidden, outputs in zip(self.hidden, self.outputs, strict=True)
        ]


def _layers(towers: int, inputs: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(towers))


def _apply(layers: nn.Module, inputs: Tensor) -> Tensor:
    assert isinstance(layers, nn.ModuleList)
    return apply_together(list(layers), inputs)
