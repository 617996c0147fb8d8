"""Train like the usual scripts: the layout of the papers computed literally in plain PyTorch.

``cd tests && python -m reference.literal DIR --model mmoe``

The baseline for mtnrec: the same prepared rows, layers, sizes, loss and optimiser, with rows loaded
one by one by worker processes, an embedding, a concatenation, a loop over the experts,
probabilities, Python lists of predictions and sklearn's AUC. It shares no code with mtnrec, and
prints its measurements as JSON.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from reference import literal_arch, literal_funnel, literal_moe
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

BATCH, WIDTH, EXPERTS = 2048, 128, 8
BOTTOM, TOWER = [512, 256], [128, 64]


class Rows(Dataset):
    """Data set that loads one row at a time."""

    def __init__(self, folder):
        names = ("categorical", "numerical", "labels")
        self.arrays = [np.load(folder / f"{name}.npy") for name in names]

    def __getitem__(self, row):
        categorical, numerical, labels = (array[row] for array in self.arrays)
        return categorical, numerical, labels.astype(np.float32)

    def __len__(self):
        return len(self.arrays[0])


class Embedding(nn.Module):
    """Concatenate the vectors of the fields and one of all numerical features."""

    def __init__(self, sizes, numericals):
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum(sizes)[:-1]]))
        self.table = nn.Embedding(int(sum(sizes)), WIDTH)
        nn.init.xavier_uniform_(self.table.weight)
        self.numerical = nn.Linear(numericals, WIDTH) if numericals else None
        self.width = WIDTH * (len(sizes) + bool(numericals))

    def forward(self, categorical, numerical):
        vectors = self.table(categorical + self.offsets)
        if self.numerical is not None:
            vectors = torch.cat([vectors, self.numerical(numerical).unsqueeze(1)], dim=1)
        return vectors.flatten(start_dim=1)


def mlp(width, widths, *, head=False):
    layers = []
    for outputs in widths:
        layers += [nn.Linear(width, outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, *([nn.Linear(width, 1)] if head else []))


class SharedBottom(nn.Module):
    def __init__(self, sizes, numericals):
        super().__init__()
        self.embedding = Embedding(sizes, numericals)
        self.bottom = mlp(self.embedding.width, BOTTOM)
        self.towers = nn.ModuleList(mlp(BOTTOM[-1], TOWER, head=True) for _ in range(2))

    def forward(self, categorical, numerical):
        hidden = self.bottom(self.embedding(categorical, numerical))
        return [torch.sigmoid(tower(hidden).squeeze(1)) for tower in self.towers]


class MMoE(nn.Module):
    def __init__(self, sizes, numericals):
        super().__init__()
        self.embedding = Embedding(sizes, numericals)
        width = self.embedding.width
        self.experts = nn.ModuleList(mlp(width, BOTTOM) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(width, EXPERTS) for _ in range(2))
        self.towers = nn.ModuleList(mlp(BOTTOM[-1], TOWER, head=True) for _ in range(2))

    def forward(self, categorical, numerical):
        row = self.embedding(categorical, numerical)
        experts = torch.stack([expert(row) for expert in self.experts], dim=1)
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights = torch.softmax(gate(row), dim=1).unsqueeze(1)
            outputs.append(torch.sigmoid(tower(torch.bmm(weights, experts).squeeze(1)).squeeze(1)))
        return outputs


class ESMM(nn.Module):
    def __init__(self, sizes, numericals):
        super().__init__()
        self.embedding = Embedding(sizes, numericals)
        widths = [*BOTTOM, *TOWER]
        self.towers = nn.ModuleList(mlp(self.embedding.width, widths, head=True) for _ in range(2))

    def forward(self, categorical, numerical):
        row = self.embedding(categorical, numerical)
        click, conversion = (torch.sigmoid(tower(row).squeeze(1)) for tower in self.towers)
        return [click, click * conversion]


def ple(sizes, numericals):
    row = partial(literal_moe.Row, sizes, numericals, WIDTH)
    levels = [[width] for width in BOTTOM]
    return literal_moe.PLE(row, 2, 4, 2, levels, TOWER)


def aitm(sizes, numericals):
    row = literal_funnel.Row(sizes, numericals, WIDTH)
    return literal_funnel.AITM(row, [*BOTTOM, *TOWER], [])


def stem(sizes, numericals):
    own = WIDTH // 3  # two tasks' tables and the shared one
    return literal_arch.STEM(sizes, numericals, own, EXPERTS, 6, BOTTOM, TOWER, TOWER)


MODELS = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "esmm": ESMM,
    "ple": ple,
    "aitm": aitm,
    "stem": stem,
}


def entropies(outputs, labels):
    loss_function = nn.BCELoss()
    return sum(loss_function(outputs[task], labels[:, task]) for task in range(2))


def calibrated(outputs, labels):
    click, conversion = outputs
    return entropies(outputs, labels) + 0.6 * torch.clamp(conversion - click, min=0).mean()


LOSSES = {"aitm": calibrated}


def train(model, loader, loss_function, optimizer, device):
    """Train one epoch; return the mean loss."""
    model.train()
    total = 0.0
    for batch in tqdm(loader, disable=None):
        categorical, numerical, labels = (part.to(device) for part in batch)
        outputs = model(categorical, numerical)
        loss = loss_function(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model, loader, device):
    """Return the AUCs of CTR, CVR and CTCVR."""
    model.eval()
    labels, scores = [[], []], [[], []]
    for categorical, numerical, truth in tqdm(loader, disable=None):
        outputs = model(categorical.to(device), numerical.to(device))
        for task in range(2):
            labels[task].extend(truth[:, task].tolist())
            scores[task].extend(outputs[task].tolist())
    clicked = [row for row, label in enumerate(labels[0]) if label]
    quotients = [scores[1][row] / scores[0][row] for row in clicked]
    return [
        roc_auc_score(labels[0], scores[0]),
        roc_auc_score([labels[1][row] for row in clicked], quotients),
        roc_auc_score(labels[1], scores[1]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a prepared data set")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=None)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    schema = json.loads((arguments.folder / "schema.json").read_text())["schema"]
    sizes = [field["vocabulary_size"] for field in schema["categorical"]]
    rows = Rows(arguments.folder / "train")
    order = torch.randperm(len(rows)).tolist()
    held_out = len(rows) // 5
    sets = {
        "train": Subset(rows, order[held_out:]),
        "val": Subset(rows, order[:held_out]),
        "test": Rows(arguments.folder / "test"),
    }
    workers = {"num_workers": arguments.workers, "persistent_workers": arguments.workers > 0}
    loaders = {
        split: DataLoader(chosen, BATCH, shuffle=split == "train", **workers)
        for split, chosen in sets.items()
    }
    model = MODELS[arguments.model](sizes, len(schema["numerical"])).to(arguments.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_function = LOSSES.get(arguments.model, entropies)
    checkpoint = arguments.checkpoint or Path(f"literal_{arguments.model}.pt")

    seconds = {"train": 0.0, "evaluate": 0.0}
    best, since, epochs = -1.0, 0, 0
    begun = time.perf_counter()
    while epochs < arguments.epochs and since < arguments.patience:
        started = time.perf_counter()
        train(model, loaders["train"], loss_function, optimizer, arguments.device)
        trained = time.perf_counter()
        auc = evaluate(model, loaders["val"], arguments.device)[1]
        seconds["train"] += trained - started
        seconds["evaluate"] += time.perf_counter() - trained
        since = 0 if auc > best else since + 1
        if auc > best:
            best = auc
            torch.save(model.state_dict(), checkpoint)
        epochs += 1
    seconds["fit"] = time.perf_counter() - begun
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    checkpoint.unlink()
    started = time.perf_counter()
    aucs = evaluate(model, loaders["test"], arguments.device)
    seconds["evaluate"] += time.perf_counter() - started
    done = {
        "fit": epochs * len(sets["train"]),
        "train": epochs * len(sets["train"]),
        "evaluate": epochs * len(sets["val"]) + len(sets["test"]),
    }
    speeds = {what: done[what] / seconds[what] for what in done}
    print(json.dumps({"samples_per_second": speeds, "aucs": aucs, "epochs": epochs}))


if __name__ == "__main__":
    main()
