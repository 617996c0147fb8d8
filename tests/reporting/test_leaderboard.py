import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtnrec.checks import InputError
from mtnrec.reporting.leaderboard import check_records, copy_records, write_leaderboard
from mtnrec.reporting.runs import read_runs
from mtnrec.tuning.record import Budget, Trial, TunedArm, Tuning

BOARD = Path(__file__).parents[2] / "leaderboard"
ARMS = {"plain": (0.80, False), "mtn": (0.82, {"lam": 0.02})}


@pytest.fixture
def write_sweep(write_run):
    """Write the folder of a tuned sweep whose runs have test AUCs around a value of each arm."""

    def write(root, *, data="synthetic", arms=ARMS, budget=4, prefix="", rate=0.002, models=()):
        found = []
        for number, (name, (auc, mtn)) in enumerate(arms.items()):
            fresh = {}
            for seed in (1, 2, 3):
                values = dict.fromkeys(("ctr", "cvr", "ctcvr"), auc + seed / 1000)
                folder = write_run(
                    *(root, f"{prefix}{name}-seed{seed}"),
                    **{"auc": values, "mtn": mtn, "seed": seed, "data": data},
                    model=dict(models).get(name, "MMoE"),
                    metrics={"test/mean_auc": auc + seed / 1000},
                    **{"optimizer.lr": rate},
                )
                edit(
                    folder,
                    versions={"mtnrec": "0.1.0"},
                    commits={"mtnrec": {"commit": "c0ffee00" * 5, "dirty": False}},
                    machine={"host": "mine", "cores": 2, "processor": "a processor"},
                    parameters={"network": 1234, "embeddings": 56789},
                )
                (folder / ".hydra").mkdir()
                lines = f"- data={data}\n- optimizer.lr={rate}\n- seed={seed}\n"
                (folder / ".hydra" / "overrides.yaml").write_text(lines)
                (folder / "checkpoints").mkdir()
                (folder / "checkpoints" / "best.ckpt").write_bytes(b"large")
                fresh[str(seed)] = folder.name
            trials = [Trial(f"trial{n}", {"optimizer.lr": rate}, 0.8) for n in range(budget)]
            found.append(
                TunedArm(
                    *(name, number == 0, "place", ["model=mmoe", f"mtn.enabled={bool(mtn)}"]),
                    *({"optimizer.lr": "interval(0,1)"}, Budget(budget, 1, 0, 0), "val/mean_auc"),
                    trials=trials,
                    fresh=fresh,
                )
            )
        Tuning.read(root / "tuning.json").replace(found).write(root)
        return root

    return write


def edit(folder, **parts):
    path = folder / "result.json"
    record = json.loads(path.read_text())
    for name, values in parts.items():
        record.setdefault(name, {}).update(values)
    path.write_text(json.dumps(record))


@pytest.fixture
def board(write_sweep, tmp_path):
    """A leaderboard with the records of two arms on a log."""
    runs = read_runs(write_sweep(tmp_path / "runs"))
    copy_records(runs, tmp_path / "board" / "synthetic")
    return tmp_path / "board"


def test_the_copy_has_records_and_overrides_alone_and_no_place_of_the_machine(board, tmp_path):
    files = {path.relative_to(board).as_posix() for path in board.rglob("*") if path.is_file()}
    text = (board / "synthetic" / "mtn" / "2" / "result.json").read_text()

    runs = [f"synthetic/{arm}/{seed}" for arm in ARMS for seed in (1, 2, 3)]
    names = ("result.json", ".hydra/overrides.yaml")
    assert files == {"synthetic/tuning.json", *(f"{run}/{name}" for run in runs for name in names)}
    assert str(tmp_path) not in text
    assert "mine" not in text


def test_the_copy_has_the_results_of_the_sweep(board, tmp_path):
    whole, copied = (read_runs(folder).results for folder in (tmp_path / "runs", board))

    keys = ["arm", "seed", "split", "task", "metric", "value"]
    whole, copied = (found[keys].sort_values(keys).to_numpy() for found in (whole, copied))
    assert np.array_equal(whole, copied)


def test_the_page_has_means_with_intervals_in_the_order_of_their_mean(board, tmp_path):
    page = tmp_path / "leaderboard.md"

    assert write_leaderboard(read_runs(board), page) == 2

    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line[:2] == "| "]
    cells = [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in rows]
    half = stats.sem([0.821, 0.822, 0.823]) * stats.t.ppf(0.975, 2)
    header = "Arm|rank|CTR AUC|CVR AUC|CTCVR AUC|mean AUC|parameters|s per epoch"
    assert "|".join(cells[0]) == header
    assert [row[0] for row in cells[2:4]] == ["MMoE+MTN", "MMoE"]
    assert cells[2][1:6] == ["1", *[f"0.8220 ±{half:.4f}"] * 4]
    assert cells[2][6] == "58,023"
    pace = [json.loads(path.read_text()) for path in board.glob("synthetic/mtn/*/result.json")]
    seconds = np.mean([record["seconds"]["fit"] / len(record["history"]) for record in pace])
    assert float(cells[2][7]) == pytest.approx(seconds, abs=0.005)


def test_rows_are_compared_with_the_first_arm_and_with_their_model_alone(write_sweep, tmp_path):
    noise = {"plain": [0, 0, 0], "mtn": [0.01, 0.012, 0.011], "wide": [0.001, -0.004, 0.002]}
    arms = {name: (0.8, {"lam": 0.1} if name == "mtn" else False) for name in noise}
    sweep = write_sweep(tmp_path / "runs", arms=arms, models={"wide": "ESMM"})
    for name, values in noise.items():
        for seed, value in enumerate(values, 1):
            edit(sweep / f"{name}-seed{seed}", metrics={"test/mean_auc": 0.8 + value})
    copy_records(read_runs(sweep), tmp_path / "board")

    write_leaderboard(read_runs(tmp_path / "board"), tmp_path / "page.md")

    rows = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 3}
    half = stats.sem(noise["mtn"]) * stats.t.ppf(0.975, 2)
    p_value = stats.ttest_1samp(noise["mtn"], 0).pvalue
    assert 0.001 < p_value < 0.005  # two stars, after Holm's correction of two tests as well
    expected = rf"+0.0110 \[{0.011 - half:+.4f}, {0.011 + half:+.4f}\]<sup>\*\*</sup><sup>‡</sup>"
    assert found["| MMoE+MTN"] == [expected, f"{expected} |"]
    assert found["| ESMM"][0].startswith("-0.0003 ")
    assert "sup" not in found["| ESMM"][0]
    assert found["| ESMM"][1] == found["| MMoE"][1] == "— |"


def test_each_row_has_its_command_and_folder(board, tmp_path):
    write_leaderboard(read_runs(board), tmp_path / "page.md")

    page = (tmp_path / "page.md").read_text()
    command = "python -m mtnrec.train hydra.mode=RUN hydra.run.dir=runs/mtn data=synthetic"
    assert f"# MMoE+MTN: {board}/synthetic/mtn\n{command} optimizer.lr=0.002 seed=1\n" in page


def test_arms_are_ranked_over_data_sets(write_sweep, tmp_path):
    arms = ARMS | {"third": (0.7, {"lam": 0.5})}
    for data in ("one", "two"):
        sweep = write_sweep(tmp_path / data, data=data, arms=arms)
        copy_records(read_runs(sweep), tmp_path / "board" / data)

    write_leaderboard(read_runs(tmp_path / "board"), tmp_path / "page.md")

    page = (tmp_path / "page.md").read_text()
    ranks = page[page.index("## Ranks") : page.index("## one")]
    assert re.search(r"MMoE\+MTN \(mtn\) \| 1\.0", ranks)
    assert re.search(r"MMoE\+MTN \(third\) \| 3\.0", ranks)


def put(board, **parts):
    edit(board / "synthetic" / "mtn" / "2", **parts)


def add_stray(board):
    """Add a run that no search has."""
    shutil.copytree(board / "synthetic" / "mtn" / "2", board / "stray")
    edit(board / "stray", config={"patience": 9})


def shorten(board):
    found = Tuning.read(board / "synthetic" / "tuning.json")
    arms = [replace(arm, trials=arm.trials[: 2 + arm.is_baseline * 2]) for arm in found.arms]
    found.replace(arms).write(board / "synthetic")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda board: put(board, data={"checksum": "0"}), "checksum of the data must be [0-9a-f]"),
        (lambda board: put(board, versions={"mtnrec": "0.2.0"}), r"must be 0\.1\.0, got 0\.2\.0"),
        (lambda board: put(board, config={"patience": 5}), "patience must be 3, got 5"),
        (
            lambda board: put(board, config={"optimizer": {"lr": 0.5}}),
            r"optimizer\.lr must be 0\.002, got 0\.5",
        ),
        (
            lambda board: put(board, counts={"test/ctr": {"rows": 5, "positives": 1}}),
            "counts must be",
        ),
        (
            lambda board: put(board, commits={"mtnrec": {"commit": "c0", "dirty": True}}),
            "changes that are not committed",
        ),
        (shorten, "number of trials must be 4, got 2"),
        (
            lambda board: shutil.rmtree(board / "synthetic" / "mtn" / "2"),
            "lacks the records of the seeds 2",
        ),
        (add_stray, "stray belongs to no tuned arm"),
    ],
)
def test_records_that_do_not_match_are_refused_before_the_page_is_written(
    change, fault, board, tmp_path
):
    page = tmp_path / "leaderboard.md"
    change(board)

    with pytest.raises(InputError, match=fault):
        write_leaderboard(read_runs(board), page)
    assert not page.exists()


def test_an_added_row_is_held_to_the_terms_of_the_data_set(write_sweep, board, tmp_path):
    arms = {"other": (0.9, {"lam": 0.1})}
    copy_records(read_runs(write_sweep(tmp_path / "more", arms=arms)), board / "synthetic" / "a")
    hasty = write_sweep(tmp_path / "hasty", arms={"hasty": (0.9, {"lam": 0.3})}, budget=40)

    assert len(check_records(read_runs(board))) == 3
    copy_records(read_runs(hasty), board / "synthetic" / "b")
    with pytest.raises(InputError, match=r"hasty in .*: budget must be Budget\(trials=4"):
        check_records(read_runs(board))


def test_two_rows_of_one_name_are_refused(write_sweep, board, tmp_path):
    for name, lam in (("a", 0.1), ("b", 0.3)):
        sweep = write_sweep(tmp_path / name, arms={"other": (0.9, {"lam": lam})})
        copy_records(read_runs(sweep), board / "synthetic" / name)

    with pytest.raises(InputError, match=r"other in .*/b: the name must be new, .*/a is the same"):
        check_records(read_runs(board))


def test_a_copy_is_refused_where_it_would_replace_or_mix(write_sweep, board, tmp_path):
    runs = read_runs(tmp_path / "runs")
    with pytest.raises(InputError, match="records must be a new folder"):
        copy_records(runs, board / "synthetic")
    write_sweep(tmp_path / "runs" / "more", prefix="b", rate=0.003)
    with pytest.raises(InputError, match="one tuned sweep, got 2"):
        copy_records(read_runs(tmp_path / "runs"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_copies_records_and_writes_the_page(board, report, tmp_path, capsys):
    copy, page = tmp_path / "copy", tmp_path / "page.md"

    report(f"runs={tmp_path / 'runs'}", f"records={copy}")
    report(f"runs={copy}", f"leaderboard={page}")

    said = capsys.readouterr().out
    assert f"the records of 6 runs are in {copy}" in said
    assert f"the leaderboard with 2 rows is in {page}" in said
    assert not (tmp_path / "runs" / "report").exists()


def test_the_records_of_the_project_match_and_its_page_is_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(BOARD.parent)

    write_leaderboard(read_runs("leaderboard"), tmp_path / "leaderboard.md")

    page = BOARD.parent / "docs" / "leaderboard.md"
    assert page.read_text() == (tmp_path / "leaderboard.md").read_text()
