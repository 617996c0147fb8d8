import csv
import json
import re
import sys
from unittest import mock

import pytest

from mtnrec import dashboard
from mtnrec.dashboard import main
from mtnrec.tracking.dashboard import make_report, make_sections, make_workspace, specification

# wandb-workspaces 0.4 uses validators of pydantic 1.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

TASKS = ["ctr", "cvr", "ctcvr"]
TINY = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mtnrec", "entity=team", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    main()


def panels_of(node):
    """Yield every panel of a specification, at any depth."""
    if isinstance(node, dict):
        if "viewType" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from panels_of(child)


@pytest.mark.parametrize("make", [make_workspace, make_report])
def test_the_specification_has_a_panel_for_each_figure(make):
    expected = [panel for panels in make_sections(TASKS).values() for panel in panels]

    spec = specification(make("team", "mtnrec", "table_1", TASKS))

    assert len(list(panels_of(spec))) == len(expected) > 20
    assert "table_1" in json.dumps(spec)
    assert json.loads(json.dumps(spec)) == spec


@pytest.mark.slow
def test_the_panels_name_only_logged_keys(train):
    folder = train(*TINY, "mtn.enabled=true", "regularizer=l2")
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        logged = set(next(csv.reader(file)))
    config = json.loads((folder / "result.json").read_text())["config"]

    named, patterns, axes = set(), set(), set()
    for panel in panels_of(specification(make_workspace("team", "mtnrec", None, TASKS))):
        settings = panel["config"]
        named |= set(settings.get("metrics", []))
        patterns |= {settings["metricRegex"]} if "metricRegex" in settings else set()
        for axis in (settings.get("xAxis", ""), settings.get("yAxis", "")):
            kind, _, name = axis.partition(":")
            if kind == "summary":
                named.add(name)
            elif kind == "config":
                axes.add(name)

    assert {"train/loss", "mtn/penalty", "val/cvr_auc", "test/ctcvr_auc"} <= named <= logged
    assert len(patterns) == 4
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in logged)
    assert axes == {"noise.value.proportion", "mtn.value.lam"}
    assert {"enabled", "lam"} <= config["mtn"].keys()
    assert "proportion" in config["noise"]


def test_offline_writes_the_specification_and_prints_how_to_send_it(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "offline=true", "kind=report", f"out={tmp_path / 'new' / 'spec.json'}")

    spec = json.loads((tmp_path / "new" / "spec.json").read_text())
    assert spec["project"] == {"name": "mtnrec", "entityName": "team"}
    assert "the same command with offline=false sends it" in capsys.readouterr().out


def test_a_write_that_fails_leaves_nothing(monkeypatch, tmp_path):
    with mock.patch("os.fsync", side_effect=OSError), pytest.raises(OSError):  # noqa: PT011
        call(monkeypatch, "offline=true", f"out={tmp_path / 'spec.json'}")

    assert list(tmp_path.iterdir()) == []


def test_a_specification_that_wandb_refuses_is_kept_in_the_file(monkeypatch, tmp_path):
    refuse = mock.Mock(save=mock.Mock(side_effect=ConnectionError("no route")))
    monkeypatch.setattr(dashboard, "make_workspace", lambda *_: refuse)
    monkeypatch.setattr(dashboard, "specification", lambda _: {"panels": []})

    with pytest.raises(SystemExit, match=r"did not accept the workspace \(no route\).*wandb login"):
        call(monkeypatch, f"out={tmp_path / 'spec.json'}")

    assert json.loads((tmp_path / "spec.json").read_text()) == {"panels": []}


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)

    with pytest.raises(SystemExit, match=r"not installed\. .*pip install 'mtnrec\[dashboard\]'"):
        call(monkeypatch, "offline=true")


def test_another_kind_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match="kind must be one of workspace, report; got 'page'"):
        call(monkeypatch, "kind=page")
