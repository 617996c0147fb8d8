"""Labels of data sets, models and MTN variants, with the settings that distinguish them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtnrec.reporting.table.published import MTN_RELATIVES, PAPER_MTN
from mtnrec.run.identity import flatten, label_flips, treatment_names
from mtnrec.run.record import RunRecord
from mtnrec.tuning.record import TunedArm

_CLASS = "._target_"  # end of the key of an object's class
LABEL_NOISE = "label_flip"  # in the label of a data set with label noise
# The paper's names, where they differ from the class.
_MODEL_NAMES = {"SharedBottom": "Shared-bottom", "SingleTask": "Single-task"}
_TREATMENT_NAMES = {"mtn": "MTN", "l2": "L2", "frobenius": "Frobenius"}


class Labels(NamedTuple):
    """Labels of a run.

    Args:
        data: Data set.
        model: Model.
        variant: Treatments that its baseline lacks, e.g. ``+MTN`` or ``+MTN+L2``; empty for a
            baseline.
    """

    data: str
    model: str
    variant: str

    @property
    def arm(self) -> str:
        """Name of the arm, the same wherever it is shown."""
        return f"{self.model} {self.variant}".strip()


def label_runs(records: Sequence[RunRecord]) -> list[Labels]:
    """Return the labels of each run.

    A label is a name and, where runs with that name differ, the settings that differ, e.g.
    ``MMoE (optimizer.lr=0.01)``; those that all its runs with a treatment share are not named. A
    variant names, for each treatment, those of its settings in which any model's variants with that
    treatment differ; of MTN, only those that are not the paper's. So ``+MTN`` and
    ``+MTN (target=shared)`` are the same for every model. A regulariser is named by its norm, and
    MTN with the settings of another paper's trace norm by the name of that norm:
    ``+MTN+L2 (lam=0.001)``, ``+LAF``. A data set with label noise names it, whether it differs or
    not: ``synthetic (label_flip.conversion=0.1)``.
    """
    variants = _variant_labels(records)
    parts = zip(_data_labels(records), _model_labels(records), variants, strict=True)
    return [Labels(*part) for part in parts]


def name_model(record: RunRecord) -> str:
    """Return the model of a run without its settings."""
    (model,), _ = _model_names([record])
    return model


def name_arm(record: RunRecord) -> str:
    """Return the model and the treatments of a run without their settings: ``MMoE+LAF``."""
    return name_model(record) + "".join(
        f"+{_treatment_title(name)}" for name in _treatments(record)
    )


def label_tuned(
    records: Sequence[RunRecord], arms: Sequence[TunedArm], sets: Callable[[str], bool]
) -> list[Labels]:
    """Return the labels of the fresh runs of tuned arms.

    The variant is the name of the arm; a model names no setting that an arm or a search sets, and
    its number of trials where these differ.

    Args:
        records: Records of the runs.
        arms: Arm of each run.
        sets: Returns whether an arm or a search sets a dotted key.
    """
    settings = [
        {
            "trials": arm.budget.trials,
            **{
                key.removeprefix("model."): value
                for key, value in record.identity.arm_settings.items()
                if not sets(key)
            },
        }
        for record, arm in zip(records, arms, strict=True)
    ]
    names, groups = _model_names(records)
    models = _labels(names, groups, settings)
    variants = [arm.title for arm in arms]
    return [Labels(*part) for part in zip(_data_labels(records), models, variants, strict=True)]


def _data_labels(records: Sequence[RunRecord]) -> list[str]:
    names = [record.data["name"] for record in records]
    parameters = [
        {
            key: value
            for key, value in flatten(record.data["parameters"])
            if f"data.{key}" not in record.keys_of_seed
        }
        for record in records
    ]
    flips = [
        {
            f"{LABEL_NOISE}.{label}": share
            for label, share in label_flips(record.config["noise"]).items()
        }
        for record in records
    ]
    labels = _labels(names, names, parameters, flips)
    of_arms = [record.identity.arm_settings["checksum"] for record in records]
    checksums = [{"checksum": text.removeprefix("per seed ")[:8]} for text in of_arms]
    pairs = {(label, part["checksum"]) for label, part in zip(labels, checksums, strict=True)}
    if len(pairs) == len(set(labels)):
        return labels
    return _labels(names, names, checksums, flips)


def _model_labels(records: Sequence[RunRecord]) -> list[str]:
    arms = [record.identity.baseline_settings for record in records]
    names, groups = _model_names(records)
    settings = [{key.removeprefix("model."): value for key, value in arm.items()} for arm in arms]
    treated = [bool(record.identity.treatments) for record in records]
    for name in {*names}:
        own = [index for index, other in enumerate(names) if other == name]
        usual = _usual([settings[index] for index in own], [treated[index] for index in own])
        for index in own:
            settings[index] = {
                key: value
                for key, value in settings[index].items()
                if key not in usual or usual[key] != value
            }
    return _labels(names, groups, settings)


def _model_names(records: Sequence[RunRecord]) -> tuple[list[str], list[Any]]:
    """Return the name of each run's model, and the group in which its settings may differ.

    Data set and noise have columns of their own: only what differs within them is named.
    """
    arms = [record.identity.baseline_settings for record in records]
    classes = [arm["model._target_"].rpartition(".")[2] for arm in arms]
    names = [_MODEL_NAMES.get(name, name) for name in classes]
    groups = [
        (name, arm["checksum"], arm["noise.proportion"], str(label_flips(record.config["noise"])))
        for name, arm, record in zip(names, arms, records, strict=True)
    ]
    return names, groups


def _usual(settings: Sequence[Mapping[str, Any]], treated: Sequence[bool]) -> dict[str, Any]:
    """Return the settings of which all treated runs have the same value, and all runs have one."""
    pairs = list(zip(settings, treated, strict=True))
    first = next((own for own, is_treated in pairs if is_treated), {})
    return {
        key: value
        for key, value in first.items()
        if all(key in own and (own[key] == value or not is_treated) for own, is_treated in pairs)
    }


def _variant_labels(records: Sequence[RunRecord]) -> list[str]:
    treatments = [_treatments(record) for record in records]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record, own in zip(records, treatments, strict=True):
        for name, settings in own.items():
            groups.setdefault((name, record.identity.baseline), []).append(settings)
    varied: dict[str, set[str]] = {}
    for (name, _), members in groups.items():
        varied.setdefault(name, set()).update(_differing(members))
    return ["".join(_parts(own, varied)) for own in treatments]


def _treatments(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Return the settings of each treatment by its name."""
    identity = record.identity
    found = {}
    for group, name in treatment_names(identity.settings).items():
        prefix = f"{group}."
        own = {
            key.removeprefix(prefix): value
            for key, value in identity.treatment_settings.items()
            if key.startswith(prefix) and not key.endswith(".enabled")
        }
        relative = _relative(own) if group == "mtn" else None
        implied = MTN_RELATIVES.get(relative or "", {})
        found[relative or name] = {k: value for k, value in own.items() if k not in implied}
    return found


def _relative(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the trace norm that the callback has the settings of; None for MTN's."""
    usual = {key: PAPER_MTN[key] for key in ("alpha", "norm", "layers")}
    for name, own in MTN_RELATIVES.items():
        expected = usual | own
        if all(settings.get(key, PAPER_MTN.get(key)) == v for key, v in expected.items()):
            return name
    return None


def _parts(
    treatments: Mapping[str, Mapping[str, Any]], varied: Mapping[str, set[str]]
) -> Iterator[str]:
    for name, own in treatments.items():
        usual = PAPER_MTN if name == "mtn" or name in MTN_RELATIVES else {}
        named = {k: own[k] for k in sorted(varied[name] & own.keys()) if own[k] != usual.get(k)}
        yield _label(f"+{_treatment_title(name)}", named)


def _treatment_title(name: str) -> str:
    return _TREATMENT_NAMES.get(name, name.replace("_", " "))


def _labels(
    names: Sequence[str],
    groups: Sequence[Any],
    settings: Sequence[Mapping[str, Any]],
    more: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Return each name, with the settings that differ within any group of that name, and more."""
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault((names[index], group), []).append(index)
    differing: dict[str, set[str]] = {name: set() for name in names}
    for (name, _), indices in members.items():
        differing[name] |= _differing([settings[index] for index in indices])
    shown = [
        {key: setting[key] for key in sorted(differing[name] & setting.keys())}
        for name, setting in zip(names, settings, strict=True)
    ]
    added = more or [{}] * len(names)
    return [
        _label(name, {**own, **also}) for name, own, also in zip(names, shown, added, strict=True)
    ]


def _differing(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that differ; those of an object that its class determines are left out."""
    keys = {key for setting in settings for key in setting}
    found = {key for key in keys if len({text_or_none(setting, key) for setting in settings}) > 1}
    return {key for key in found if not _follows_class(key, settings)}


def _follows_class(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    class_key = f"{key.rpartition('.')[0]}{_CLASS}"
    if key == class_key or not any(class_key in setting for setting in settings):
        return False
    values: dict[str | None, set[str | None]] = {}
    for setting in settings:
        own = values.setdefault(text_or_none(setting, class_key), set())
        own.add(text_or_none(setting, key))
    return all(len(own) == 1 for own in values.values())


def _label(name: str, settings: Mapping[str, Any]) -> str:
    parts = [
        f"{key.removesuffix(_CLASS)}={str(value).rpartition('.')[2]}"
        if key.endswith(_CLASS)
        else f"{key}={as_text(value)}"
        for key, value in settings.items()
    ]
    return f"{name} ({', '.join(parts)})" if parts else name


def as_text(value: Any) -> str:
    """Format a setting as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def text_or_none(settings: Mapping[str, Any], key: str) -> str | None:
    """Format a setting as on the command line; None if it is not set."""
    return as_text(settings[key]) if key in settings else None
