"""Measure the evaluation metrics next to scikit-learn on lists.

``python benchmarks/evaluate.py [--rows 10000000] [--batch 2048] [--groups]``

The rows are random: log-probabilities of a funnel with its labels. Each variant gets them batch by
batch, as in an evaluation; drawing them is not timed. Each variant runs in a separate process, in
turn, and the shortest of three passes counts. Memory is the peak above that before the first
batch.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mtnrec.batch import LogProbabilities
from mtnrec.metric.ranking import auc
from mtnrec.metric.task_metrics import TaskMetrics, rows_of_task
from mtnrec.schema import Schema

_ROWS_PER_DRAW = 1 << 18
_ROWS_PER_GROUP = 10
_PASSES = 3
_SCHEMA = Schema((), ("price",), ("click", "conversion"), funnel=True)

Rows = tuple[LogProbabilities, Tensor, Tensor | None]


def _batches(arguments: argparse.Namespace) -> Iterator[Rows]:
    """Draw the rows: 4 % of them clicked, 7 % of these converted."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, arguments.rows, _ROWS_PER_DRAW):
        rows = min(_ROWS_PER_DRAW, arguments.rows - first)
        click, buy = torch.randn(2, rows, generator=generator) - torch.tensor([[3.5], [3.0]])
        clicked, bought = torch.rand(2, rows, generator=generator) < torch.stack(
            [click.sigmoid(), buy.sigmoid()]
        )
        positive = torch.stack([logsigmoid(click), logsigmoid(click) + logsigmoid(buy)], dim=1)
        no_buy = torch.logaddexp(logsigmoid(-click), logsigmoid(click) + logsigmoid(-buy))
        negative = torch.stack([logsigmoid(-click), no_buy], dim=1)
        labels = torch.stack([clicked, clicked & bought], dim=1).float()
        group = torch.arange(first, first + rows) // _ROWS_PER_GROUP if arguments.groups else None
        for start in range(0, rows, arguments.batch):
            part = slice(start, start + arguments.batch)
            # Copies, since a network's outputs are not views.
            output = LogProbabilities(positive[part].clone(), negative[part].clone())
            yield output, labels[part], None if group is None else group[part].clone()


def _feed(
    arguments: argparse.Namespace, collect: Callable[[LogProbabilities, Tensor, Any], None]
) -> float:
    """Return the seconds spent collecting all batches."""
    seconds = 0.0
    for batch in _batches(arguments):
        started = perf_counter()
        collect(*batch)
        seconds += perf_counter() - started
    return seconds


def _measure_mtnrec(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of each part, and the AUCs."""
    metrics = TaskMetrics(_SCHEMA)
    seconds = {"collecting": _feed(arguments, metrics.update)}
    started = perf_counter()
    values = metrics.compute()
    seconds["computing"] = perf_counter() - started
    return seconds, {name: values[f"{name}_auc"].item() for name in ("ctr", "cvr", "ctcvr")}


def _measure_aucs(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of the AUCs alone, and the AUCs."""
    outputs, labels = [], []
    for output, label, _ in _batches(arguments):
        outputs.append(output)
        labels.append(label.byte())
    started = perf_counter()
    whole = LogProbabilities(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
    together = torch.cat(labels)
    aucs = {}
    for task in _SCHEMA.tasks:
        rows = rows_of_task(task, whole, together, None)
        aucs[task.name] = auc(rows.positive, rows.labels).item()
    return {"computing": perf_counter() - started}, aucs


def _measure_lists(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of each part and the AUCs for scikit-learn on lists."""
    # Imported here to keep it out of the other variants' memory.
    from sklearn.metrics import roc_auc_score

    scores: dict[str, list[float]] = {"ctr": [], "cvr": [], "ctcvr": []}
    truth: dict[str, list[float]] = {"ctr": [], "cvr": [], "ctcvr": []}

    def collect(output: LogProbabilities, labels: Tensor, _: Any) -> None:
        clicked = labels[:, 0] > 0
        quotient = output.positive[:, 1] - output.positive[:, 0]
        scores["ctr"].extend(output.positive[:, 0].tolist())
        scores["cvr"].extend(quotient[clicked].tolist())
        scores["ctcvr"].extend(output.positive[:, 1].tolist())
        truth["ctr"].extend(labels[:, 0].tolist())
        truth["cvr"].extend(labels[clicked, 1].tolist())
        truth["ctcvr"].extend(labels[:, 1].tolist())

    seconds = {"collecting": _feed(arguments, collect)}
    started = perf_counter()
    aucs = {name: float(roc_auc_score(truth[name], scores[name])) for name in scores}
    seconds["computing"] = perf_counter() - started
    return seconds, aucs


_VARIANTS = {"mtnrec": _measure_mtnrec, "aucs": _measure_aucs, "lists": _measure_lists}


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(arguments: argparse.Namespace) -> None:
    for _ in _batches(argparse.Namespace(**{**vars(arguments), "rows": _ROWS_PER_DRAW})):
        pass
    before = _resident_bytes()
    seconds, aucs = _VARIANTS[arguments.variant](arguments)
    print(json.dumps({"seconds": seconds, "aucs": aucs, "bytes": _resident_bytes() - before}))


def _run(variant: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, *sys.argv, "--variant", variant], check=True, stdout=subprocess.PIPE
    )
    return json.loads(process.stdout)


def main() -> None:
    """Print one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--groups", action="store_true", help="also compute grouped AUCs")
    parser.add_argument("--variant", choices=_VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        _measure(arguments)
        return
    passes = [{variant: _run(variant) for variant in _VARIANTS} for _ in range(_PASSES)]
    best = {variant: min((p[variant] for p in passes), key=_total) for variant in _VARIANTS}
    slowest = _total(best["lists"])
    print("| | collecting | computing | total | lists over it | peak memory | per row |")
    print("|---|---|---|---|---|---|---|")
    names = {"mtnrec": "all metrics", "aucs": "the three AUCs alone", "lists": "scikit-learn"}
    for variant, found in best.items():
        collecting = found["seconds"].get("collecting")
        print(
            f"| {names[variant]} | {'' if collecting is None else f'{collecting:.2f} s'} "
            f"| {found['seconds']['computing']:.2f} s | {_total(found):.2f} s "
            f"| {slowest / _total(found):.0f} | {found['bytes'] / 2**20:.0f} MiB "
            f"| {found['bytes'] / arguments.rows:.0f} bytes |"
        )
    print()
    for name, expected in best["lists"]["aucs"].items():
        found = [best[variant]["aucs"][name] for variant in ("mtnrec", "aucs")]
        difference = max(abs(value - expected) for value in found)
        print(f"{name}: AUC {found[0]:.15f}, scikit-learn's differs by {difference:.1e}")
        if difference > 1e-12:
            sys.exit("the AUCs differ by more than 1e-12")


def _total(found: dict[str, Any]) -> float:
    return sum(found["seconds"].values())


if __name__ == "__main__":
    main()
