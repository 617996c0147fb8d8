"""Single-task, OMoE, PLE and AdaTT-sp as loops over layers on concatenated embeddings.

Parameters have the names of mtnrec's networks, whose state they load; the program shares no code
with mtnrec. ``forward`` returns the probability of each label, ``(B,)``.
"""

import torch
from torch import nn


def mlp(width, widths, *, head=False):
    layers = []
    for outputs in widths:
        layers += [nn.Linear(width, outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, *([nn.Linear(width, 1)] if head else []))


def probability(tower, hidden):
    return torch.sigmoid(tower(hidden).squeeze(1))


def mixture(weights, outputs):
    """Sum of the outputs, each times its column of the weights."""
    return sum(weights[:, i : i + 1] * output for i, output in enumerate(outputs))


class Row(nn.Module):
    """The vectors of the fields and one of all numerical features, side by side."""

    def __init__(self, sizes, numericals, dim):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        self.numerical = nn.Linear(numericals, dim)
        self.width = dim * (len(sizes) + 1)

    def forward(self, categorical, numerical):
        vectors = [table(categorical[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat([*vectors, self.numerical(numerical)], dim=1)


class SingleTask(nn.Module):
    def __init__(self, rows, labels, tower_widths):
        super().__init__()
        self.inputs = nn.ModuleList(rows() for _ in range(labels))
        width = self.inputs[0].width
        self.towers = nn.ModuleList(mlp(width, tower_widths, head=True) for _ in range(labels))

    def forward(self, categorical, numerical):
        pairs = zip(self.inputs, self.towers, strict=True)
        return [probability(tower, row(categorical, numerical)) for row, tower in pairs]


class OMoE(nn.Module):
    def __init__(self, rows, labels, experts, expert_widths, tower_widths):
        super().__init__()
        self.input = rows()
        width = self.input.width
        self.experts = nn.ModuleList(mlp(width, expert_widths) for _ in range(experts))
        self.gate = nn.Linear(width, experts)
        last = expert_widths[-1]
        self.towers = nn.ModuleList(mlp(last, tower_widths, head=True) for _ in range(labels))

    def forward(self, categorical, numerical):
        x = self.input(categorical, numerical)
        mixed = mixture(torch.softmax(self.gate(x), dim=1), [expert(x) for expert in self.experts])
        return [probability(tower, mixed) for tower in self.towers]


class PLELevel(nn.Module):
    def __init__(self, width, widths, labels, shared, own, *, last):
        super().__init__()
        count = labels * own + shared
        self.experts = nn.ModuleList(mlp(width, widths) for _ in range(count))
        self.gates = nn.ModuleList(nn.Linear(width, own + shared) for _ in range(labels))
        self.shared_gate = None if last else nn.Linear(width, count)
        self.own = own

    def forward(self, tasks, shared):
        first_shared = len(tasks) * self.own
        common = [expert(shared) for expert in self.experts[first_shared:]]
        outputs, everything = [], []
        for task, (stream, gate) in enumerate(zip(tasks, self.gates, strict=True)):
            mine = range(task * self.own, (task + 1) * self.own)
            own = [self.experts[i](stream) for i in mine]
            outputs.append(mixture(torch.softmax(gate(stream), dim=1), own + common))
            everything += own
        if self.shared_gate is None:
            return outputs, None
        shares = torch.softmax(self.shared_gate(shared), dim=1)
        return outputs, mixture(shares, everything + common)


class PLE(nn.Module):
    def __init__(self, rows, labels, experts, task_experts, levels, tower_widths):
        super().__init__()
        self.input = rows()
        width, made = self.input.width, []
        for number, widths in enumerate(levels):
            last = number == len(levels) - 1
            made.append(PLELevel(width, widths, labels, experts, task_experts, last=last))
            width = widths[-1]
        self.levels = nn.ModuleList(made)
        self.towers = nn.ModuleList(mlp(width, tower_widths, head=True) for _ in range(labels))

    def forward(self, categorical, numerical):
        x = self.input(categorical, numerical)
        tasks, shared = [x] * len(self.towers), x
        for level in self.levels:
            tasks, shared = level(tasks, shared)
        return [probability(tower, u) for tower, u in zip(self.towers, tasks, strict=True)]


class AdaTTLevel(nn.Module):
    def __init__(self, width, widths, labels, own):
        super().__init__()
        self.experts = nn.ModuleList(mlp(width, widths) for _ in range(labels * own))
        self.gates = nn.ModuleList(nn.Linear(width, labels * own) for _ in range(labels))
        self.own_weights = nn.Parameter(torch.zeros(labels, own)) if own > 1 else None
        self.own = own

    def forward(self, tasks):
        outputs = [expert(tasks[i // self.own]) for i, expert in enumerate(self.experts)]
        streams = []
        for task, (stream, gate) in enumerate(zip(tasks, self.gates, strict=True)):
            fused = mixture(torch.softmax(gate(stream), dim=1), outputs)
            mine = outputs[task * self.own : (task + 1) * self.own]
            if self.own_weights is None:
                fused = fused + mine[0]
            else:
                for weight, output in zip(self.own_weights[task], mine, strict=True):
                    fused = fused + weight * output
            streams.append(fused)
        return streams


class AdaTT(nn.Module):
    def __init__(self, rows, labels, task_experts, levels, tower_widths):
        super().__init__()
        self.input = rows()
        width, made = self.input.width, []
        for widths in levels:
            made.append(AdaTTLevel(width, widths, labels, task_experts))
            width = widths[-1]
        self.levels = nn.ModuleList(made)
        self.towers = nn.ModuleList(mlp(width, tower_widths, head=True) for _ in range(labels))

    def forward(self, categorical, numerical):
        x = self.input(categorical, numerical)
        tasks = [x] * len(self.towers)
        for level in self.levels:
            tasks = level(tasks)
        return [probability(tower, u) for tower, u in zip(self.towers, tasks, strict=True)]


MODELS = {"single_task": SingleTask, "omoe": OMoE, "ple": PLE, "adatt": AdaTT}
