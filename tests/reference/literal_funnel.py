"""AITM, ESCM2, DCMT and the controls computed literally: a loop of layers, probabilities, BCE.

The parameters have the names of mtnrec's networks, with which this file shares no code.
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy


class Row(nn.Module):
    """Concatenate the vectors of the fields and one of all numerical features."""

    def __init__(self, sizes, numericals, width):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.numerical = nn.Linear(numericals, width)
        self.width = width * (len(sizes) + 1)

    def forward(self, categorical, numerical):
        vectors = [table(column) for table, column in zip(self.tables, categorical.T, strict=True)]
        return torch.cat([*vectors, self.numerical(numerical)], dim=1)


def mlp(width, widths, *, head=False):
    layers = []
    for outputs in widths:
        layers += [nn.Linear(width, outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, *([nn.Linear(width, 1)] if head else []))


class Funnel(nn.Module):
    """Towers of CTR, CVR and perhaps an imputation, on the row or on mixed experts."""

    def __init__(self, row, tower_widths, *, towers=2, experts=0, expert_widths=(), second=None):
        super().__init__()
        self.input = row
        width = row.width
        if experts:
            self.experts = nn.ModuleList(mlp(width, expert_widths) for _ in range(experts))
            self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in range(towers))
            width = expert_widths[-1]
        self.towers = nn.ModuleList(mlp(width, tower_widths, head=True) for _ in range(towers))
        if second == "click_gate":
            self.click_gate = nn.Linear(tower_widths[-1], tower_widths[-1], bias=False)
        if second == "counterfactual":
            self.counterfactual = nn.Linear(tower_widths[-1], 1)

    def forward(self, categorical, numerical):
        """Return the probabilities of all heads, ``(B,)`` each."""
        row = self.input(categorical, numerical)
        hidden = []
        for index, tower in enumerate(self.towers):
            own = row
            if hasattr(self, "experts"):
                outputs = torch.stack([expert(row) for expert in self.experts], dim=1)
                weights = torch.softmax(self.gates[index](row), dim=1)
                own = (weights.unsqueeze(2) * outputs).sum(dim=1)
            hidden.append(tower[:-1](own))
        if hasattr(self, "click_gate"):
            gate = 2 * torch.sigmoid(self.click_gate(hidden[0].detach()))
            hidden[1] = hidden[1] * gate
        logits = [tower[-1](units) for tower, units in zip(self.towers, hidden, strict=True)]
        if hasattr(self, "counterfactual"):
            logits.append(self.counterfactual(hidden[1]))
        return [torch.sigmoid(logit.squeeze(1)) for logit in logits]


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.transfer = nn.Linear(width, width)
        self.attention = nn.Linear(width, 3 * width, bias=False)


class AITM(nn.Module):
    def __init__(self, row, tower_widths, head_widths, stages=2):
        super().__init__()
        self.input = row
        self.towers = nn.ModuleList(mlp(row.width, tower_widths) for _ in range(stages))
        width = tower_widths[-1]
        self.transfers = nn.ModuleList(Pair(width) for _ in range(stages - 1))
        self.heads = nn.ModuleList(mlp(width, head_widths, head=True) for _ in range(stages))

    def forward(self, categorical, numerical):
        """Return the probabilities of the stages, ``(B,)`` each."""
        row = self.input(categorical, numerical)
        towers = [tower(row) for tower in self.towers]
        states = [towers[0]]
        for pair, own in zip(self.transfers, towers[1:], strict=True):
            transferred = torch.relu(pair.transfer(states[-1]))
            query, key, value = pair.attention.weight.chunk(3)
            scores = [
                ((token @ query.T) * (token @ key.T)).sum(dim=1) / own.shape[1] ** 0.5
                for token in (transferred, own)
            ]
            first = torch.sigmoid(scores[0] - scores[1]).unsqueeze(1)  # softmax over two
            states.append(first * (transferred @ value.T) + (1 - first) * (own @ value.T))
        logits = [head(state) for head, state in zip(self.heads, states, strict=True)]
        return [torch.sigmoid(logit.squeeze(1)) for logit in logits]


def rows_of(probability, label):
    return binary_cross_entropy(probability, label, reduction="none")


def aitm_losses(probabilities, y, z):
    click, conversion = probabilities
    return {
        "click": rows_of(click, y).mean(),
        "conversion": rows_of(conversion, z).mean(),
        "calibrator": torch.clamp(conversion - click, min=0).mean(),
    }


def label_losses(probabilities, y, z):
    click, conversion, *_ = probabilities
    return {
        "click": rows_of(click, y).mean(),
        "conversion": rows_of(click * conversion, z).mean(),
    }


def esmm_losses(probabilities, y, z):
    click, conversion = probabilities
    return label_losses(probabilities, y, z) | {
        "clicked_ctcvr": (y * rows_of(click * conversion, z)).sum() / len(y),
        "clicked_cvr": (y * rows_of(conversion, z)).sum() / len(y),
    }


def naive_losses(probabilities, y, z):
    clicked = y == 1
    return label_losses(probabilities, y, z) | {
        "clicked_cvr": rows_of(probabilities[1][clicked], z[clicked]).mean()
    }


def clipped(propensity, observed, ratio):
    return torch.clamp(1 / propensity.detach(), max=ratio / observed.mean().item())


def escm2_losses(probabilities, y, z, *, ratio=10.0, normalised=False):
    click, conversion, *imputation = probabilities
    weights = y * clipped(click, y, ratio)
    named = label_losses(probabilities, y, z)
    if not imputation:
        total = (weights * rows_of(conversion, z)).sum()
        return named | {"weighted_cvr": total / (weights.sum() if normalised else len(y))}
    imputed = imputation[0]
    target = imputed.detach() + weights * (z - imputed.detach())
    doubly_robust = -target * conversion.log() - (1 - target) * (1 - conversion).log()
    fixed = conversion.detach()
    error = rows_of(fixed, z) - (-imputed * fixed.log() - (1 - imputed) * (1 - fixed).log())
    return named | {
        "weighted_cvr": doubly_robust.mean(),
        "imputation": (weights * error**2).mean(),
    }


def dcmt_losses(probabilities, y, z, *, ratio=10.0):
    click, conversion, counterfactual = probabilities
    factual = y * clipped(click, y, ratio) * rows_of(conversion, z)
    other = (1 - y) * clipped(1 - click, 1 - y, ratio) * rows_of(counterfactual, 1 - z)
    return label_losses(probabilities, y, z) | {
        "weighted_cvr": (factual + other).mean(),
        "agreement": (1 - conversion - counterfactual).abs().mean(),
    }
