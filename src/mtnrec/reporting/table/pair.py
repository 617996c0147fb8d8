"""Tables of two runs side by side."""

from mtnrec.metric.catalogue import METRICS, parse_metric_key
from mtnrec.reporting.labels import text_or_none
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.run.identity import flatten
from mtnrec.run.record import RunRecord

_EMPTY = "—"


def settings_of_pair(first: RunRecord, second: RunRecord) -> Table:
    """Return the settings that differ between two runs, data and seed included."""
    settings = [
        dict(flatten(run.identity.settings)) | {"data (checksum)": run.data["checksum"]}
        for run in (first, second)
    ]
    rows = []
    for key in sorted({key for of_run in settings for key in of_run}):
        texts = [text_or_none(of_run, key) for of_run in settings]
        if texts[0] != texts[1]:
            rows.append(Row(key, tuple(Cell(_EMPTY if t is None else t) for t in texts)))
    notes = () if rows else ("The two runs have the same settings.",)
    group = Group("", ("A", "B"))
    return Table("Settings that differ", "key", (group,), tuple(rows), notes, is_text=True)


def metrics_of_pair(first: RunRecord, second: RunRecord) -> Table:
    """Return the metrics of two runs and the difference, those of the test rows first."""
    names = sorted({*first.metrics, *second.metrics}, key=_place)
    rows = []
    for name in names:
        a, b = (run.metrics.get(name) for run in (first, second))
        texts = [_EMPTY if value is None else f"{value:.6f}" for value in (a, b)]
        difference = _EMPTY if a is None or b is None else f"{b - a:+.6f}"
        rows.append(Row(name, tuple(Cell(text) for text in (*texts, difference))))
    for name, values in (
        ("best epoch", (first.best_epoch, second.best_epoch)),
        ("seconds of training", (first.seconds["fit"], second.seconds["fit"])),
    ):
        texts = [f"{value:g}" for value in values]
        rows.append(Row(name, tuple(Cell(t) for t in (*texts, f"{values[1] - values[0]:+g}"))))
    return Table("Metrics", "metric", (Group("", ("A", "B", "B - A")),), tuple(rows))


def _place(name: str) -> tuple[bool, int, str]:
    key = parse_metric_key(name)
    order = list(METRICS)
    return (
        not name.startswith("test/"),
        order.index(key.metric) if key and key.metric in order else len(order),
        name,
    )
