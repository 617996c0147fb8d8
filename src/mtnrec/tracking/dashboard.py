"""W&B workspace or report of a project: its panels by section."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from mtnrec.checks import InputError
from mtnrec.metric.catalogue import layer_key, metric_key

LAYER = "[0-9]+"
TABLES = ("metrics", "alphas", "spectra", "calibration")  # logged by mtnrec.tracking.loggers


def make_workspace(entity: str, project: str, experiment: str | None, tasks: Sequence[str]) -> Any:
    """Return a ``wandb_workspaces`` workspace with runs grouped by arm."""
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
        # The default project is the report's; naming one would look it up over the network.
        runs = wr.Runset(filters=_filters(experiment), groupby=["group"])
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity, project=project, title=_title(experiment), blocks=blocks, width="fluid"
    )


def make_sections(tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Return the panels of each section."""
    wr = _load("reports.v2")
    aucs = [metric_key("test", task, "auc") for task in tasks]

    def scatter(key: str, *, log_x: bool = False) -> list[Any]:
        x = wr.Config(key)
        return [
            wr.ScatterPlot(title=auc, x=x, y=wr.SummaryMetric(auc), log_x=log_x) for auc in aucs
        ]

    def by_epoch(*names: str) -> list[Any]:
        return [wr.LinePlot(title=name, x="epoch", y=[name]) for name in names]

    def per_layer(name: str) -> Any:
        return wr.LinePlot(
            title=name, x="epoch", metric_regex=layer_key(LAYER, f"{name}(_[a-z]+)?")
        )

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
        "Noise": scatter("noise.proportion"),
        "Lambda": scatter("mtn.lam", log_x=True),
        "Training": by_epoch("train/loss", *(metric_key("val", task, "auc") for task in tasks)),
        "Penalty": by_epoch(
            *("mtn/norm", "mtn/penalty", "mtn/loss_share", "mtn/push", "mtn/zero_gradient_share"),
            *("regularizer/norm", "regularizer/loss_share", "regularizer/push"),
        ),
        "Alphas": [per_layer("alpha")],
        "Spectra": [per_layer("effective_rank"), per_layer("norm"), per_layer("distance")],
        "Tables": [wr.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in TABLES],
    }


def specification(view: Any) -> dict[str, Any]:
    """Return the JSON-ready specification of a workspace or report that W&B receives."""
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
            "the dashboard needs wandb-workspaces, which is not installed. Install it with "
            "`pip install 'mtnrec[dashboard]'`."
        ) from error
