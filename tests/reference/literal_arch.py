"""HEAC, STEM and MMoE with cross network and personal gates: loops over layers on wide rows.

Each model returns the probability of each label, ``(B,)``. Parameters are named as in mtnrec.
"""

import torch
from torch import nn


class Row(nn.Module):
    """Concatenate the vectors of the fields and one of all numerical features."""

    def __init__(self, sizes, numericals, width):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.numerical = nn.Linear(numericals, width)

    def forward(self, categorical, numerical):
        vectors = [t(c) for t, c in zip(self.tables, categorical.unbind(1), strict=True)]
        return torch.cat([*vectors, self.numerical(numerical)], dim=1)

    def columns(self):
        return (len(self.tables) + 1) * self.numerical.out_features


class Cross(nn.Module):
    def __init__(self, width, layers, rank):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, row):
        x = row
        for v, u in zip(self.down, self.up, strict=True):
            x = row * (x @ v.weight.T @ u.weight.T + u.bias) + x
        return x


class CrossedRow(Row):
    def __init__(self, sizes, numericals, width, layers, rank):
        super().__init__(sizes, numericals, width)
        self.cross = Cross(self.columns(), layers, rank)

    def forward(self, categorical, numerical):
        return self.cross(super().forward(categorical, numerical))


def mlp(width, widths, *, head=0):
    layers = []
    for outputs in widths:
        layers += [nn.Linear(width, outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, *([nn.Linear(width, head)] if head else []))


class Gates(nn.Module):
    """Of one kind of layer, ``[depth][task]``, as mtnrec stores them."""

    def __init__(self, inputs, tower_widths, tasks):
        super().__init__()
        self.hidden = nn.ModuleList(
            nn.ModuleList(nn.Linear(inputs, width) for _ in range(tasks)) for width in tower_widths
        )
        self.outputs = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width) for _ in range(tasks)) for width in tower_widths
        )

    def gate(self, depth, task, inputs):
        hidden = torch.relu(self.hidden[depth][task](inputs))
        return 2 * torch.sigmoid(self.outputs[depth][task](hidden))


class MMoE(nn.Module):
    def __init__(
        self, sizes, numericals, width, experts, expert_widths, tower_widths, *, cross, personal
    ):
        super().__init__()
        self.input = (
            CrossedRow(sizes, numericals, width, *cross) if cross else Row(sizes, numericals, width)
        )
        columns = self.input.columns()
        self.experts = nn.ModuleList(mlp(columns, expert_widths) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(columns, experts) for _ in range(2))
        self.towers = nn.ModuleList(mlp(expert_widths[-1], tower_widths, head=1) for _ in range(2))
        self.personal = personal
        if personal:
            inputs = len(personal) * width + expert_widths[-1]
            self.personal_gates = Gates(inputs, tower_widths, 2)

    def forward(self, categorical, numerical):
        row = self.input(categorical, numerical)
        experts = torch.stack([expert(row) for expert in self.experts], dim=1)
        outputs = []
        for task, tower in enumerate(self.towers):
            weights = torch.softmax(self.gates[task](row), dim=1).unsqueeze(2)
            x = mixture = (weights * experts).sum(dim=1)
            *layers, head = tower
            for number, layer in enumerate(layers):
                x = layer(x)
                if self.personal and isinstance(layer, nn.ReLU):
                    vectors = [self.input.tables[f](categorical[:, f]) for f in self.personal]
                    inputs = torch.cat([*vectors, mixture.detach()], dim=1)
                    x = x * self.personal_gates.gate(number // 2, task, inputs)
            outputs.append(torch.sigmoid(head(x).squeeze(1)))
        return outputs


class HEAC(nn.Module):
    def __init__(self, sizes, numericals, width, experts, critics, expert_widths, gate_widths):
        super().__init__()
        self.input = Row(sizes, numericals, width)
        self.experts = nn.ModuleList(
            mlp(self.input.columns(), expert_widths) for _ in range(experts)
        )
        self.tasks = nn.Parameter(torch.zeros(2, width))
        self.expert_gate, self.critic_gate = (
            nn.Sequential(mlp(2 * width, gate_widths), nn.Linear(gate_widths[-1], outputs))
            for outputs in (experts, critics)
        )
        self.critics = nn.Linear(expert_widths[-1], critics)

    def forward(self, categorical, numerical):
        row = self.input(categorical, numerical)
        experts = [expert(row) for expert in self.experts]
        fields = row.view(len(row), -1, self.tasks.shape[1])
        outputs = []
        for task in self.tasks:
            context = torch.cat([fields.mean(dim=1), task.expand(len(row), -1)], dim=1)
            weights = torch.softmax(self.expert_gate(context), dim=1)
            mixture = sum(weights[:, e : e + 1] * experts[e] for e in range(len(experts)))
            shares = torch.softmax(self.critic_gate(context), dim=1)
            p = torch.sigmoid(self.critics(mixture))
            outputs.append((shares * p).sum(dim=1))
        return outputs


class STEM(nn.Module):
    def __init__(
        self,
        sizes,
        numericals,
        width,
        experts,
        task_experts,
        expert_widths,
        gate_widths,
        tower_widths,
    ):
        super().__init__()
        self.inputs = nn.ModuleList(Row(sizes, numericals, width) for _ in range(3))
        columns = self.inputs[0].columns()
        self.owners = [0] * task_experts + [1] * task_experts + [2] * experts
        self.experts = nn.ModuleList(mlp(columns, expert_widths) for _ in self.owners)
        self.gates = nn.ModuleList(mlp(columns, gate_widths) for _ in range(2))
        self.gate_outputs = nn.ModuleList(
            nn.Linear(gate_widths[-1], len(self.owners)) for _ in range(2)
        )
        self.towers = nn.ModuleList(mlp(expert_widths[-1], tower_widths, head=1) for _ in range(2))

    def forward(self, categorical, numerical):
        rows = [part(categorical, numerical) for part in self.inputs]
        experts = [
            expert(rows[owner]) for expert, owner in zip(self.experts, self.owners, strict=True)
        ]
        outputs = []
        for task in range(2):
            gate = self.gate_outputs[task](self.gates[task](rows[task] + rows[2]))
            weights = torch.softmax(gate, dim=1)
            mixture = 0
            for number, (owner, expert) in enumerate(zip(self.owners, experts, strict=True)):
                seen = expert if owner in (task, 2) else expert.detach()
                mixture = mixture + weights[:, number : number + 1] * seen
            outputs.append(torch.sigmoid(self.towers[task](mixture).squeeze(1)))
        return outputs
