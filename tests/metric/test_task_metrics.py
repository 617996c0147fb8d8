"""The metrics of a split against scikit-learn on all of its rows at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import entr
from sklearn import metrics

from mtnrec.batch import LogProbabilities
from mtnrec.metric.calibration import calibration_curve, expected_calibration_error
from mtnrec.metric.ranking import grouped_auc
from mtnrec.metric.task_metrics import TaskMetrics, all_rows_metrics, bayes_aucs
from mtnrec.schema import Schema

FUNNEL = Schema((), ("price",), ("click", "conversion"), funnel=True)
INDEPENDENT = Schema((), ("price",), ("like", "share", "buy"), funnel=False)


def draw(rows, *, labels=2, seed=0):
    """Noisy probabilities, labels and groups; two labels follow the funnel."""
    rng = np.random.default_rng(seed)
    p = rng.random((rows, labels)).round(2).clip(0.01, 0.99)
    y = (rng.random((rows, labels)) < p).astype(np.float32)
    if labels == 2:
        p[:, 1] *= p[:, 0]
        y[:, 1] *= y[:, 0]
    p = torch.from_numpy(p)
    output = LogProbabilities(p.log().float(), (-p).log1p().float())
    return output, torch.from_numpy(y), torch.from_numpy(rng.integers(0, rows // 9 + 1, rows))


def compute(task_metrics):
    """Metrics and, as ``task_bins_column``, the curves."""
    found = task_metrics.compute()
    for task, curve in task_metrics.curves.items():
        found |= {f"{task}_bins_{name}": column for name, column in curve._asdict().items()}
    return found


def measure(schema, output, labels, groups, cuts=()):
    """Metrics and curves of the rows, fed in pieces that end at ``cuts``."""
    task_metrics = TaskMetrics(schema)
    for piece in torch.arange(len(labels)).tensor_split(list(cuts)):
        part = LogProbabilities(output.positive[piece], output.negative[piece])
        task_metrics.update(part, labels[piece], None if groups is None else groups[piece])
    return compute(task_metrics)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_agrees(found, task, p, labels, groups):
    """Compare one task with scikit-learn; ``p`` and ``labels`` are of the task's rows."""
    clipped = p.clip(max=1 - 1e-7)
    log_loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - clipped)).mean()
    assert found[f"{task}_auc"].item() == pytest.approx(metrics.roc_auc_score(labels, p), abs=1e-12)
    assert found[f"{task}_log_loss"].item() == pytest.approx(log_loss, rel=1e-5)
    assert found[f"{task}_calibration"].item() == pytest.approx(p.sum() / labels.sum(), rel=1e-6)
    ece = expected_calibration_error(calibration_curve(*map(torch.from_numpy, (p, labels))))
    assert found[f"{task}_ece"].item() == pytest.approx(ece.item(), rel=1e-3)
    grouped = grouped_auc(*map(torch.from_numpy, (p, labels)), groups).mean
    assert found[f"{task}_grouped_auc"].item() == pytest.approx(grouped.item(), abs=1e-12)
    assert found[f"{task}_rows"].item() == len(labels)
    assert found[f"{task}_positives"].item() == labels.sum()


@pytest.mark.parametrize("cuts", [(1,), (0, 100, 250, 250, 399), tuple(range(400))])
def test_batches_do_not_matter(cuts):
    output, labels, groups = draw(400)

    assert_same(
        measure(FUNNEL, output, labels, groups, cuts), measure(FUNNEL, output, labels, groups)
    )


def test_the_order_of_the_rows_does_not_matter():
    output, labels, groups = draw(400)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    mixed = LogProbabilities(output.positive[shuffled], output.negative[shuffled])

    found = measure(FUNNEL, mixed, labels[shuffled], groups[shuffled])

    torch.testing.assert_close(found, measure(FUNNEL, output, labels, groups))


def test_ctr_and_ctcvr_count_all_rows():
    output, labels, groups = draw(2000)

    found = measure(FUNNEL, output, labels, groups, cuts=(300, 1100))

    p, y = output.positive.double().exp().numpy(), labels.numpy()
    assert_agrees(found, "ctr", p[:, 0], y[:, 0], groups)
    assert_agrees(found, "ctcvr", p[:, 1], y[:, 1], groups)


def test_cvr_counts_clicked_rows_and_ranks_by_the_quotient():
    output, labels, groups = draw(2000)

    found = measure(FUNNEL, output, labels, groups, cuts=(300, 1100))

    clicked = labels[:, 0] == 1
    # In float32 as in the metrics: a rounded quotient can tie with another.
    log_quotient = (output.positive[:, 1] - output.positive[:, 0])[clicked]
    quotient = log_quotient.double().exp().numpy()
    assert_agrees(found, "cvr", quotient, labels[clicked, 1].numpy(), groups[clicked])
    exact = output.positive.double().exp()[clicked]
    auc = metrics.roc_auc_score(labels[clicked, 1], exact[:, 1] / exact[:, 0])
    assert found["cvr_auc"].item() == pytest.approx(auc, abs=1e-4)


def test_the_mean_auc_is_the_mean_over_the_tasks():
    output, labels, groups = draw(600, labels=3, seed=4)

    found = measure(INDEPENDENT, output, labels, groups)

    scores = output.positive.exp().numpy()
    aucs = [metrics.roc_auc_score(labels[:, task], scores[:, task]) for task in range(3)]
    assert found["mean_auc"].item() == pytest.approx(np.mean(aucs), abs=1e-12)


def test_a_task_called_mean_keeps_its_auc():
    schema = Schema((), ("price",), ("mean", "like"), funnel=False)
    output, labels, groups = draw(600, seed=5)

    found = measure(schema, output, labels, groups)

    auc = metrics.roc_auc_score(labels[:, 0], output.positive[:, 0])
    assert found["mean_auc"].item() == pytest.approx(auc, abs=1e-12)


def test_hand_values_of_the_funnel():
    p = torch.tensor([[0.5, 0.4], [0.8, 0.2], [0.4, 0.1], [0.9, 0.8]], dtype=torch.float64)
    labels = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 0]])

    found = measure(FUNNEL, LogProbabilities(p.log(), (1 - p).log()), labels, None)

    # Quotients on the clicked rows: 0.8 (converted), 0.25, 0.889.
    assert found["ctr_auc"].item() == 1
    assert found["cvr_auc"].item() == 0.5
    assert found["ctcvr_auc"].item() == 2 / 3
    assert found["cvr_log_loss"].item() == pytest.approx(-np.log(0.8 * 0.75 * (1 - 0.8 / 0.9)) / 3)
    assert found["cvr_calibration"].item() == pytest.approx(0.8 + 0.25 + 0.8 / 0.9)
    assert [found[f"{task}_rows"].item() for task in ("ctr", "cvr", "ctcvr")] == [4, 3, 4]
    assert [found[f"{task}_positives"].item() for task in ("ctr", "cvr", "ctcvr")] == [3, 1, 1]


def test_a_quotient_above_one_has_a_finite_log_loss():
    p = torch.tensor([[0.2, 0.6], [0.5, 0.5], [0.5, 0.1]], dtype=torch.float64)
    labels = torch.tensor([[1, 0], [1, 1], [1, 1]])

    found = measure(FUNNEL, LogProbabilities(p.log(), (1 - p).log()), labels, None)

    assert found["cvr_auc"].item() == 0  # the quotients 3, 1, 0.2 rank it last
    expected = -(np.log(1e-7) + np.log(1) + np.log(0.2)) / 3
    assert found["cvr_log_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_quotient_above_one_is_not_rewarded_where_the_row_converts():
    p = torch.tensor([[0.2, 0.6], [0.5, 0.5], [0.5, 0.1]], dtype=torch.float64)
    labels = torch.tensor([[1, 1], [1, 1], [1, 0]])

    found = measure(FUNNEL, LogProbabilities(p.log(), (1 - p).log()), labels, None)

    assert found["cvr_log_loss"].item() == pytest.approx(-np.log(0.8) / 3, rel=1e-6)


def test_the_curve_of_a_quotient_may_exceed_one_and_agrees_with_the_error():
    p = torch.tensor([[0.2, 0.6], [0.5, 0.4], [0.9, 0.3]], dtype=torch.float64)
    labels = torch.tensor([[1, 0], [1, 1], [0, 0]])
    task_metrics = TaskMetrics(FUNNEL)
    task_metrics.update(LogProbabilities(p.log(), (1 - p).log()), labels, None)

    found = task_metrics.compute()

    predicted, observed, rows = task_metrics.curves["cvr"]
    assert predicted.tolist() == pytest.approx([0.8, 3])
    assert observed.tolist() == [1, 0]
    assert rows.tolist() == [1, 1]
    assert found["cvr_ece"].item() == pytest.approx((0.2 + 3) / 2)


def test_each_task_has_the_curve_of_its_rows():
    output, labels, groups = draw(2000, labels=3)
    task_metrics = TaskMetrics(INDEPENDENT)
    task_metrics.update(output, labels, groups)

    found = task_metrics.compute()

    assert list(task_metrics.curves) == list(INDEPENDENT.labels)
    for column, (task, curve) in enumerate(task_metrics.curves.items()):
        p, y = output.positive[:, column].double().exp(), labels[:, column]
        by_hand = (curve.predicted - curve.observed).abs().numpy()
        torch.testing.assert_close(curve, calibration_curve(p, y), rtol=0, atol=0)
        weighted = np.average(by_hand, weights=curve.rows.numpy())
        assert found[f"{task}_ece"].item() == pytest.approx(weighted, abs=1e-13)


def test_independent_labels_are_separate_tasks():
    output, labels, groups = draw(500, labels=3)

    found = measure(INDEPENDENT, output, labels, groups, cuts=(200,))

    p, y = output.positive.double().exp().numpy(), labels.numpy()
    assert {name.split("_")[0] for name in found} == {"like", "share", "buy", "mean"}
    for column, task in enumerate(INDEPENDENT.labels):
        assert_agrees(found, task, p[:, column], y[:, column], groups)


@pytest.mark.parametrize(("label", "positives"), [(0.0, 0), (1.0, 30)])
def test_one_class_has_no_auc_and_the_right_counts(label, positives):
    output, labels, groups = draw(30)

    found = measure(FUNNEL, output, torch.full_like(labels, label), groups, cuts=(7,))

    for task in ("ctr", "cvr", "ctcvr"):
        assert found[f"{task}_auc"].isnan()
        assert found[f"{task}_grouped_auc"].isnan()
        assert found[f"{task}_positives"].item() == positives
    assert found["ctr_rows"].item() == 30
    assert found["cvr_rows"].item() == positives


def test_data_without_groups_has_no_grouped_auc():
    output, labels, _ = draw(100)

    found = measure(FUNNEL, output, labels, None, cuts=(50,))

    assert not [name for name in found if "grouped" in name]


def test_reset_discards_the_rows():
    output, labels, groups = draw(100)
    task_metrics = TaskMetrics(FUNNEL)
    task_metrics.update(*draw(50, seed=1))
    task_metrics.compute()

    task_metrics.reset()
    task_metrics.update(output, labels, groups)

    assert_same(compute(task_metrics), measure(FUNNEL, output, labels, groups))


def test_predictions_are_kept_without_their_graph():
    output, labels, groups = draw(10)
    task_metrics = TaskMetrics(FUNNEL)

    task_metrics.update(
        LogProbabilities(*(part.requires_grad_() for part in output)), labels, groups
    )

    assert not any(value.requires_grad for value in task_metrics.compute().values())


def test_bayes_aucs_are_those_of_the_true_probabilities():
    output, labels, _ = draw(2000)
    p, y = output.positive.double().exp().numpy(), labels.numpy().astype(np.uint8)

    found = bayes_aucs(FUNNEL, p, y)

    clicked = y[:, 0] == 1
    quotient = np.log(p[clicked, 1]) - np.log(p[clicked, 0])
    expected = {
        "ctr_bayes_auc": metrics.roc_auc_score(y[:, 0], p[:, 0]),
        "cvr_bayes_auc": metrics.roc_auc_score(y[clicked, 1], quotient),
        "ctcvr_bayes_auc": metrics.roc_auc_score(y[:, 1], p[:, 1]),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def true_and_predicted(rows, stages, seed=0):
    """True probabilities of a funnel, and other log-probabilities, whose quotients have ties."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.05, 0.95, (rows, stages)).cumprod(axis=1)
    # Whole numbers, so that differences are exact.
    logs = -rng.integers(1, 6, (rows, stages)).cumsum(axis=1).astype(float)
    return true, torch.from_numpy(logs)


def pairwise_auc(scores, true):
    """Sum over all pairs of rows: the first as a positive, the second as a negative."""
    wins = total = 0.0
    for score, p in zip(scores, true, strict=True):
        for other, q in zip(scores, true, strict=True):
            wins += p * (1 - q) * (0.5 if score == other else float(score > other))
            total += p * (1 - q)
    return wins / total


@pytest.mark.parametrize("labels", [("click", "conversion"), ("click", "cart", "buy")])
def test_conditional_tasks_are_compared_with_the_truth_on_all_rows(labels):
    schema = Schema((), ("price",), labels, funnel=True)
    true, predicted = true_and_predicted(60, len(labels))

    found = all_rows_metrics(schema, predicted, torch.from_numpy(true))

    conditional = [task for task in schema.tasks if task.given is not None]
    logs = predicted.numpy()
    expected = {}
    for stage, task in enumerate(conditional, start=1):
        truth = true[:, stage] / true[:, stage - 1]
        score = np.exp(logs[:, stage] - logs[:, stage - 1])
        # Each row twice: as a positive that weighs p, and as a negative that weighs 1 - p.
        both = np.repeat([1, 0], len(truth)), np.tile(score, 2)
        log_loss = metrics.log_loss(*both, sample_weight=np.concatenate([truth, 1 - truth]))
        expected[f"{task.name}_all_rows_auc"] = pairwise_auc(score, truth)
        expected[f"{task.name}_all_rows_log_loss"] = log_loss
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_the_truth_has_the_log_loss_of_its_entropy_and_no_score_a_larger_auc():
    true, predicted = true_and_predicted(500, 2)
    p = torch.from_numpy(true)
    cvr = true[:, 1] / true[:, 0]

    exact, other = (all_rows_metrics(FUNNEL, s, p) for s in (p.log(), predicted))

    entropy = (entr(cvr) + entr(1 - cvr)).mean()
    assert exact["cvr_all_rows_log_loss"].item() == pytest.approx(entropy, rel=1e-12)
    assert other["cvr_all_rows_log_loss"] > entropy
    assert other["cvr_all_rows_auc"] < exact["cvr_all_rows_auc"]


def test_a_quotient_above_one_never_gains_log_loss_over_all_rows():
    true = torch.tensor([[0.5, 0.4]], dtype=torch.float64)
    above = torch.tensor([[0.2, 0.6]], dtype=torch.float64)

    found = all_rows_metrics(FUNNEL, above.log(), true)["cvr_all_rows_log_loss"].item()

    assert found == pytest.approx(-0.2 * np.log(1e-7), rel=1e-6)


def test_only_the_truth_of_every_row_adds_metrics_and_labels_do_not_change_them():
    output, labels, groups = draw(400)
    true, _ = true_and_predicted(400, 2)

    def measured(labels, probabilities):
        task_metrics = TaskMetrics(FUNNEL)
        for piece in torch.arange(400).split(150):
            part = LogProbabilities(output.positive[piece], output.negative[piece])
            task_metrics.update(part, labels[piece], groups[piece])
        return task_metrics.compute(probabilities)

    plain, found = measured(labels, None), measured(labels, true)
    flipped = measured(labels[:, [1, 0]], true)

    added = {"cvr_all_rows_auc", "cvr_all_rows_log_loss"}
    assert found.keys() - plain.keys() == added
    assert_same({name: found[name] for name in plain}, plain)
    assert all(torch.equal(found[name], flipped[name]) for name in added)
    assert_same(measured(labels, true[:399]), plain)


def test_independent_labels_have_no_conditional_task():
    true, predicted = true_and_predicted(50, 3)

    assert all_rows_metrics(INDEPENDENT, predicted, torch.from_numpy(true)) == {}


TWO_RANKS = """
import sys
import torch
from torch import distributed, multiprocessing
from mtnrec.batch import LogProbabilities
from mtnrec.metric.task_metrics import TaskMetrics
from mtnrec.schema import Schema

def measure(rank, folder):
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    metrics = TaskMetrics(Schema((), ("price",), ("click", "conversion"), funnel=True))
    found = []
    for split in torch.load(f"{folder}/batches.pt")[rank]:
        for positive, negative, labels, groups in split:
            metrics.update(LogProbabilities(positive, negative), labels, groups)
        found.append(metrics.compute())
        for task, curve in metrics.curves.items():
            found[-1] |= {f"{task}_bins_{name}": column for name, column in curve._asdict().items()}
        metrics.reset()
    torch.save(found, f"{folder}/found_{rank}.pt")
    distributed.destroy_process_group()

# Forked, so that torch is imported once.
multiprocessing.start_processes(measure, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_processes_with_unequal_rows_find_the_values_of_one(tmp_path: Path):
    output, labels, groups = draw(100)

    def batch(start, end, *, grouped=True):
        tensors = (output.positive, output.negative, labels, groups if grouped else None)
        return tuple(None if tensor is None else tensor[start:end] for tensor in tensors)

    # Two splits; the second has no groups, and none of its rows are on the second rank.
    ranks = [
        [
            [batch(0, 30), batch(30, 60)],
            [batch(0, 30, grouped=False), batch(30, 60, grouped=False)],
        ],
        [[batch(60, 93), batch(93, 93), batch(93, 100)], [batch(0, 0, grouped=False)] * 2],
    ]
    torch.save(ranks, tmp_path / "batches.pt")
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)

    command = [sys.executable, tmp_path / "two_ranks.py", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert process.returncode == 0, process.stderr
    head = LogProbabilities(output.positive[:60], output.negative[:60])
    expected = [measure(FUNNEL, output, labels, groups), measure(FUNNEL, head, labels[:60], None)]
    for rank in range(2):
        found = torch.load(tmp_path / f"found_{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
