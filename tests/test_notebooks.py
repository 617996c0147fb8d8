"""Notebooks, run from top to bottom on one tiny sweep."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mtnrec.mtn.callback import COLLAPSED_ALPHA
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.scores import split_by_table

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "noise_robustness", "mechanism", "from_python", "own_model")
TASKS = ("ctr", "cvr", "ctcvr")
SEEDS = (0, 1)
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
QUICK_ALPHAS = "mtn.alpha_optimizer.lr=2"  # large enough to collapse in two epochs
PAIRS = ["seed=0,1", "noise.proportion=0,0.1", "mtn.enabled=false,true", "mtn.lam=1e-3"]
ARMS = ["seed=0", "mtn.enabled=true", "mtn.target=towers,shared", "mtn.lam=0"]


@pytest.fixture(scope="module")
def sweep(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for grid in (PAIRS, ARMS):
        train("hydra.mode=MULTIRUN", *LOG, QUICK_ALPHAS, *grid, model="mmoe", folder=folder)
    return folder


@pytest.fixture(scope="module")
def records(sweep):
    """Records by target (None without MTN), lambda, noise and seed."""
    found = {}
    for path in sweep.rglob("result.json"):
        record = json.loads(path.read_text())
        mtn = record["mtn"]
        arm = (mtn["target"], mtn["lam"]) if mtn["enabled"] else (None, None)
        found[*arm, record["noise"]["proportion"], record["seed"]] = record
    return found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks: most of the time goes to its imports."""
    home = str(tmp_path_factory.mktemp("jupyter"))
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    folders = dict.fromkeys((*names, "MPLCONFIGDIR"), home)
    client = NotebookClient(nbformat.v4.new_notebook(), resources={"metadata": {"path": home}})
    with (
        mock.patch.dict(os.environ, folders, PYTHONPATH=os.pathsep.join(sys.path)),
        client.setup_kernel(),
    ):
        yield client


@pytest.fixture
def execute(kernel):
    """Run a notebook, on the runs of a folder, without variables of earlier notebooks."""

    def run(name, runs="runs"):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        start = f"%reset -f\n%env MTNREC_RUNS={runs}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
        kernel.nb = notebook
        kernel.execute(cleanup_kc=False)
        return notebook

    return run


def kinds(notebook):
    """Count the outputs of each kind."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return Counter(kind for output in outputs for kind in output.get("data", ()))


def said(notebook, tag):
    """Return the text that the cell with this tag prints."""
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def aucs(records, task, *arm):
    """Return the test AUCs of an arm, one per seed."""
    return np.array([records[*arm, seed]["metrics"][f"test/{task}_auc"] for seed in SEEDS])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))

    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert {str((cell["outputs"], cell["execution_count"])) for cell in code} == {"([], None)"}
    assert list(notebook["metadata"]) == ["kernelspec"]


def test_every_notebook_is_run():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.slow
def test_the_quickstart_compares_the_pairs_of_the_records(execute, records, sweep):
    notebook = execute("quickstart", sweep)

    baseline = aucs(records, "cvr", None, None, 0.1)
    treated = aucs(records, "cvr", "towers", 1e-3, 0.1)
    sentence = said(notebook, "comparison")
    assert "(lam=0.001) on synthetic, noise 0.1, test cvr AUC" in sentence
    assert f": {treated.mean():.6f} with MTN, {baseline.mean():.6f} without;" in sentence
    assert f"over 2 pairs is {(treated - baseline).mean():+.6f}." in sentence
    assert kinds(notebook)["image/png"] == 1
    scores = len(split_by_table(read_runs(sweep).results))
    assert kinds(notebook)["text/html"] == 4 + scores + 1 + 2  # pandas, differences, origin


@pytest.mark.slow
def test_the_noise_notebook_takes_changes_seed_by_seed_and_corrects_for_all_tests(
    execute, records, sweep
):
    notebook = execute("noise_robustness", sweep)

    arms = [(None, None), ("towers", 1e-3)]
    changes = np.concatenate(
        [aucs(records, t, *a, 0.1) - aucs(records, t, *a, 0) for t in TASKS for a in arms]
    )
    losses, mean = (changes < 0).sum(), changes.mean()
    assert said(notebook, "reference") == (
        f"{len(changes)} changes since noise 0, {losses} of them losses; the mean is {mean:+.6f}.\n"
    )
    # Without noise only one seed has all variants, and one pair has no test.
    tests = [
        stats.ttest_rel(*(aucs(records, task, *arm, 0.1) for arm in reversed(arms)))
        for task in TASKS
    ]
    found = multipletests([test.pvalue for test in tests], method="holm")[0]
    higher = np.array([test.statistic > 0 for test in tests])
    assert said(notebook, "holm") == (
        f"synthetic: 3 comparisons, {found.sum()} with a Holm-corrected p below 0.05; MTN has the "
        f"higher mean in {(found & higher).sum()} of these and in {higher.sum()} of all.\n"
    )
    assert kinds(notebook)["image/png"] == 3
    assert kinds(notebook)["text/html"] == 5


@pytest.mark.slow
def test_the_mechanism_notebook_counts_collapses_and_pairs_with_lambda_0(execute, records, sweep):
    notebook = execute("mechanism", sweep)

    last = [
        record["history"][-1]
        for (target, _, noise, _), record in records.items()
        if target and noise == 0
    ]
    largest = [
        max(entry[f"{layer}/alpha_{mode}"] for mode in (first, "output", "input"))
        for entry in last
        for first in ("task", "expert")
        for layer in {name.rpartition("/")[0] for name in entry if name.endswith(f"alpha_{first}")}
    ]
    collapsed = sum(alpha > COLLAPSED_ALPHA for alpha in largest)
    assert 0 < collapsed < len(largest)
    assert said(notebook, "collapse").startswith(f"{collapsed} of {len(largest)} layers,")
    penalised, free = (
        run["history"][run["best_epoch"]]
        for run in (records["towers", lam, 0, 0] for lam in (1e-3, 0))
    )
    names = [name for name in free if name.endswith("/distance") or "/effective_rank_" in name]
    lower = sum(penalised[name] < free[name] for name in names)
    assert said(notebook, "unpenalised") == (
        f"{len(names)} comparisons with lambda 0; the value is lower under the penalty in "
        f"{lower} of them.\n"
    )
    # Spectra, effective ranks and alphas of 2 targets, 3 other curves, heat maps.
    assert kinds(notebook)["image/png"] == 3 * 2 + 3 + 1
    assert kinds(notebook)["text/html"] == 5


@pytest.mark.slow
def test_a_frame_is_trained_on_scored_and_compared_without_a_terminal(execute):
    notebook = execute("from_python")

    scores, comparison = (
        output["data"]["text/html"]
        for cell in notebook.cells[-4:]
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    )
    assert all(task in scores for task in ("ctr", "cvr", "ctcvr"))
    assert "+MTN" in comparison


@pytest.mark.slow
def test_a_custom_model_is_trained_with_mtn(execute):
    notebook = execute("own_model")

    (shapes,) = (o["data"]["text/plain"] for o in notebook.cells[6].outputs if "data" in o)
    assert shapes == "[[(16, 16), (16, 16)], [(1, 16), (1, 16)]]"
    assert "effective_rank_task" in str(notebook.cells[-2].outputs)
