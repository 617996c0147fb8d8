"""Make a W&B workspace or report of the runs of a project.

``python -m mtnrec.dashboard entity=TEAM experiment=table_1 kind=report``
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich import get_console

from mtnrec.checks import InputError, check_choice, check_flag
from mtnrec.config import entry_point
from mtnrec.files import write_json

LAYER = "mtn/layer_[0-9]+"
TABLES = ("metrics", "alphas", "spectra", "calibration")  # of mtnrec.tracking


@entry_point("dashboard")
def main(cfg: DictConfig) -> None:
    """Write the specification of a W&B workspace or report, and send it unless offline."""
    check_choice("kind", cfg.kind, ["workspace", "report"])
    check_flag("offline", cfg.offline)
    make = make_workspace if cfg.kind == "workspace" else make_report
    view = make(cfg.entity, cfg.project, cfg.experiment, list(cfg.tasks))
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, specification(view))
    again = "the same command with offline=false sends it"
    if cfg.offline:
        said = f"The specification is {out}; {again}"
    else:
        try:
            view.save()
        except Exception as error:  # of wandb, its transport or its server
            raise InputError(
                f"W&B did not take the {cfg.kind} ({error}); the specification is {out}: log in "
                f"with `wandb login`; where W&B can be reached, {again}"
            ) from error
        said = f"The {cfg.kind} is {view.url}"
    get_console().print(said, markup=False, soft_wrap=True)


def make_workspace(entity: str, project: str, experiment: str | None, tasks: Sequence[str]) -> Any:
    """Return a ``wandb_workspaces`` workspace; an arm's runs are grouped."""
    ws, expr = _load("workspaces"), _load("expr")
    sections = [
        ws.Section(name=name, panels=panels, is_open=True)
        for name, panels in make_sections(tasks).items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_title(experiment),
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filters(experiment), groupby=[expr.Metric("Group")]
        ),
    )


def make_report(entity: str, project: str, experiment: str | None, tasks: Sequence[str]) -> Any:
    """Return a ``wandb_workspaces`` report with the panels of the workspace."""
    wr = _load("reports.v2")
    blocks = []
    for name, panels in make_sections(tasks).items():
        # Of the report's own project; one that is named is looked up, which needs a network.
        runs = wr.Runset(filters=_filters(experiment), groupby=["group"])
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity, project=project, title=_title(experiment), blocks=blocks, width="fluid"
    )


def make_sections(tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Return the panels of each figure."""
    wr = _load("reports.v2")
    aucs = [f"test/{task}_auc" for task in tasks]

    def against(key: str, *, log_x: bool = False) -> list[Any]:
        x = wr.Config(key)
        return [
            wr.ScatterPlot(title=auc, x=x, y=wr.SummaryMetric(auc), log_x=log_x) for auc in aucs
        ]

    def by_epoch(*names: str) -> list[Any]:
        return [wr.LinePlot(title=name, x="epoch", y=[name]) for name in names]

    def of_layers(name: str) -> Any:
        return wr.LinePlot(title=name, x="epoch", metric_regex=f"{LAYER}/{name}(_[a-z]+)?")

    return {
        "MTN against baseline": [
            wr.BarPlot(
                title=auc,
                metrics=[auc],
                groupby=wr.Config("mtn.enabled"),
                groupby_aggfunc="mean",
                groupby_rangefunc="stderr",
            )
            for auc in aucs
        ],
        "Noise": against("noise.proportion"),
        "Lambda": against("mtn.lam", log_x=True),
        "Training": by_epoch("train/loss", *(f"val/{task}_auc" for task in tasks)),
        "Penalty": by_epoch("mtn/norm", "mtn/penalty", "mtn/loss_share", "mtn/zero_gradient_share"),
        "Alphas": [of_layers("alpha")],
        "Spectra": [of_layers("effective_rank"), of_layers("norm"), of_layers("distance")],
        "Tables": [wr.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in TABLES],
    }


def specification(view: Any) -> dict[str, Any]:
    """Return what W&B is sent of a workspace or report, ready for JSON."""
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def _title(experiment: str | None) -> str:
    return "mtnrec" if experiment is None else f"mtnrec {experiment}"


def _filters(experiment: str | None) -> Any:
    if experiment is None:
        return ""
    expr = _load("expr")
    return expr.And(expr.Tags().isin([experiment]))


def _load(name: str) -> Any:
    try:
        return import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise InputError(
            "the dashboard needs wandb-workspaces, which is not installed: "
            "pip install 'mtnrec[dashboard]'"
        ) from error


if __name__ == "__main__":
    main()
