import re
import sys

import pytest

from mtnrec.compare import main


@pytest.fixture
def compare(monkeypatch, capsys):
    """Run the command; return what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        main()
        return capsys.readouterr().out

    return run


def rows(text):
    return [re.split(r"\s*[│┃]\s*", line.strip(" │┃")) for line in text.splitlines()]


def test_only_what_differs_is_listed_next_to_all_metrics(write_run, tmp_path, compare):
    a = write_run(tmp_path, "a", auc={"ctr": 0.7})
    b = write_run(tmp_path, "b", auc={"ctr": 0.75}, seed=1, **{"optimizer.lr": 0.01})

    found = rows(compare(a, b / "result.json"))

    assert ["optimizer.lr", "0.001", "0.01"] in found
    assert ["seed", "0", "1"] in found
    assert not [row for row in found if row[0] == "patience"]
    assert ["test/ctr_auc", "0.700000", "0.750000", "+0.050000"] in found
    assert ["best epoch", "2", "2", "+0"] in found


def test_runs_with_and_without_mtn_are_compared(write_run, tmp_path, compare):
    found = rows(compare(write_run(tmp_path, "a"), write_run(tmp_path, "b", mtn=True)))

    assert ["mtn.enabled", "false", "true"] in found
    assert ["mtn.lam", "—", "1e-05"] in found


def test_a_folder_without_a_record_is_refused(write_run, tmp_path, compare):
    run = write_run(tmp_path, "a")

    with pytest.raises(
        SystemExit, match=r"^mtnrec: the arguments must be folders of finished runs"
    ):
        compare(run, tmp_path)
