"""Published results as data, and the deviations of ours from them."""

from typing import Any

import pandas as pd

PAPER_PROTOCOL = (
    "Paper: mean of 10 runs; 20 % of the training rows are held out for validation; the validation "
    "CVR AUC selects the epoch and stops training when it has decreased for 3 consecutive epochs."
)
TABLE_2_REMARK = (
    "Table 2 is scrambled in the copy of the paper that was read: the rows of ESMM and "
    "Shared-bottom were put back in order by position."
)
MTRECLIB_PROTOCOL = (
    "README of MTReclib: mean of 5 runs with batch norm and dropout 0.2; the epoch is selected "
    "on the test set."
)
DATA_NAMES = {
    "aliexpress_nl": "AliExpress NL",
    "aliexpress_es": "AliExpress ES",
    "aliexpress_us": "AliExpress US",
    "aliexpress_fr": "AliExpress FR",
    "aliexpress_ru": "AliExpress RU",
    "ali_ccp": "Ali-CCP",
}
MODELS = ("MMoE", "ESMM", "Shared-bottom")
TASKS = ("ctr", "cvr", "ctcvr")

_PLACE = ["data", "noise", "model", "mtn", "task"]
# Section 3.3, and the variant used in the tables (sections 2.2 and 2.3).
PAPER_MTN = {
    "lam": 1e-5,
    "target": "towers",
    "layers": "all",
    "alpha": "learned",
    "layer_weighting": "mean",
    "coupling": "gradient",
    "norm": "trace",
    "frobenius": True,
}
# Other papers' trace norms, as in conf/mtn, by their name in a label.
MTN_RELATIVES: dict[str, dict[str, Any]] = {
    "GTTN": {"layers": "last_hidden", "frobenius": False},
    "LAF": {"alpha": [1, 0, 0], "frobenius": False},
    "TT": {"alpha": [0.5, 0, 0.5], "frobenius": False},
    "Tucker": {"alpha": "uniform", "frobenius": False},
    "Capped": {"norm": "capped", "alpha": "uniform", "frobenius": False, "refresh_every": 1},
    "Nuclear": {"norm": "nuclear", "alpha": "uniform", "frobenius": False},
}
_MTN_VARIANT = rf"^(\+(?:MTN|{'|'.join(MTN_RELATIVES)})(?: \([^)]*\))?)"
# Each model has two lines: without and with MTN.
_TABLE_1_COLUMNS = [(data, 0.0) for data in (*list(DATA_NAMES)[:3], "ali_ccp")]
_TABLE_1 = """
.7258 .7934 .8616  .7281 .8313 .8901  .7061 .8310 .8751  .6187 .6739 .6521
.7267 .7951 .8630  .7303 .8304 .8912  .7058 .8326 .8763  .6198 .6768 .6548
.7259 .7946 .8620  .7288 .8331 .8916  .7065 .8357 .8765  .6157 .6656 .6471
.7252 .7966 .8634  .7306 .8323 .8926  .7082 .8324 .8770  .6170 .6748 .6559
.7245 .7939 .8605  .7291 .8231 .8903  .7053 .8312 .8749  .6144 .6416 .6268
.7259 .7950 .8620  .7311 .8316 .8924  .7076 .8326 .8773  .6159 .6520 .6289
"""
_TABLE_2_COLUMNS = [("ali_ccp", noise) for noise in (0.05, 0.1, 0.15)]
_TABLE_2 = """
.6171 .6584 .6451  .6169 .6555 .6438  .6168 .6508 .6399
.6183 .6669 .6520  .6182 .6591 .6454  .6177 .6582 .6444
.6166 .6665 .6459  .6162 .6547 .6421  .6164 .6534 .6315
.6204 .6732 .6537  .6180 .6626 .6468  .6172 .6601 .6456
.6167 .6582 .6355  .6155 .6539 .6314  .6159 .6502 .6306
.6188 .6640 .6406  .6180 .6585 .6371  .6171 .6586 .6365
"""
_MTRECLIB = """
Shared-bottom  .7228 .8511  .7287 .8866  .7245 .8700  .7029 .8698
MMoE           .7234 .8606  .7285 .8898  .7216 .8811  .7043 .8758
PLE            .7292 .8591  .7273 .8913  .7276 .8805  .7138 .8675
"""


def task_title(task: str) -> str:
    """Return the paper's name of a funnel task; other names are unchanged.

    >>> task_title("ctcvr"), task_title("buy_now")
    ('CTCVR', 'buy_now')
    """
    return task.upper() if task in TASKS else task


def paper_results() -> pd.DataFrame:
    """Return the test AUCs of the paper's Tables 1 and 2, one row per number.

    Columns: ``data``, ``noise``, ``model``, ``mtn``, ``task``, ``auc`` and ``table``. See
    ``PAPER_PROTOCOL`` and ``TABLE_2_REMARK``.
    """
    rows = [
        (data, noise, model, mtn, task, auc, table)
        for table, text, columns in (
            (1, _TABLE_1, _TABLE_1_COLUMNS),
            (2, _TABLE_2, _TABLE_2_COLUMNS),
        )
        for (model, mtn), line in zip(
            ((model, mtn) for model in MODELS for mtn in (False, True)),
            text.strip().splitlines(),
            strict=True,
        )
        for (data, noise, task), auc in zip(
            ((*column, task) for column in columns for task in TASKS),
            map(float, line.split()),
            strict=True,
        )
    ]
    return pd.DataFrame(rows, columns=[*_PLACE, "auc", "table"])


def mtreclib_results() -> pd.DataFrame:
    """Return the test AUCs of MTReclib's README; columns as in :func:`paper_results`.

    Their protocol differs from the paper's: see ``MTRECLIB_PROTOCOL``.
    """
    columns = [
        (f"aliexpress_{country}", task)
        for country in ("nl", "es", "fr", "us")
        for task in ("ctr", "ctcvr")
    ]
    rows = [
        (data, 0.0, model, False, task, float(auc))
        for model, *values in map(str.split, _MTRECLIB.strip().splitlines())
        for (data, task), auc in zip(columns, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*_PLACE, "auc"])


def has_paper_settings(table: pd.DataFrame) -> pd.Series:
    """Return whether each row has the paper's MTN settings; False without MTN.

    Args:
        table: Table with a column per MTN setting; records of earlier versions lack some.
    """
    same = table["mtn"].copy()
    for key, value in PAPER_MTN.items():
        usual: Any = "true" if value is True else value
        same &= (table[key].fillna(usual) == usual).astype(bool)
    return same


def mtn_part(variants: pd.Series) -> pd.Series:
    """Return the part of variants' labels that names MTN; NaN without MTN.

    >>> mtn_part(pd.Series(["+MTN (lam=0.1)+L2", "+L2"])).tolist()
    ['+MTN (lam=0.1)', nan]
    """
    return variants.str.extract(_MTN_VARIANT, expand=False)


def deviations(cells: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Return the deviations of test AUCs from published ones, one row per match.

    Data sets and models are matched by name; MTN matches if lambda, target, layers, alphas, layer
    weighting, coupling and norm are the paper's. Arms with a regulariser match nothing. Other
    choices (widths, optimiser) may differ.

    Args:
        cells: Output of :func:`mtnrec.reporting.table.scores.comparisons`.
        published: :func:`paper_results` or :func:`mtreclib_results`.

    Returns:
        ``data``, ``noise``, ``model``, ``variant``, ``task``, ``published``, ``ours``,
        ``deviation`` (ours minus theirs) and ``seeds``; empty if nothing matches.
    """
    has_regularizer = cells["variant"] != mtn_part(cells["variant"]).fillna("")
    as_in_paper = (~cells["mtn"] | has_paper_settings(cells)) & ~has_regularizer
    chosen = cells[as_in_paper & (cells["metric"] == "auc") & (cells["split"] == "test")]
    names = {key: chosen[key].map(_name) for key in ("data", "model")}
    labels = {f"{key}_label": chosen[key] for key in names}
    matched = chosen.assign(**names, **labels).merge(published, on=_PLACE)
    return pd.DataFrame(
        {
            "data": matched["data_label"],
            "noise": matched["noise"],
            "model": matched["model_label"],
            "variant": matched["variant"],
            "task": matched["task"],
            "published": matched["auc"],
            "ours": matched["mean"],
            "deviation": matched["mean"] - matched["auc"],
            "seeds": matched["seeds"],
        }
    )


def _name(label: str) -> str:
    """Remove the settings from a label.

    >>> _name("MMoE (optimizer.lr=0.01)")
    'MMoE'
    """
    return label.partition(" (")[0]
