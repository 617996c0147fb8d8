"""Identity of a run: the settings that determine its result, and IDs and names derived from them.

An *arm* is all runs that differ only in their seed and the keys derived from it. The *baseline* of
an arm has the same settings without the treatments. The report, W&B and sweep folders use these
definitions.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mtnrec.run.secrets import redact

TREATMENTS = ("mtn", "regularizer")  # config groups that a baseline lacks
# Groups left out of the settings where they add nothing.
_OPTIONAL = ("regularizer", "loss", "balance", "scheduler", "metrics", "callbacks")
_DEFAULTS = {
    "loss": {"_target_": "mtnrec.objective.loss.CrossEntropy"},
    "balance": {"_target_": "mtnrec.objective.balance.Weights", "weights": None},
    "scheduler": {
        "_target_": "torch.optim.lr_scheduler.ConstantLR",
        "_partial_": True,
        "factor": 1,
    },
}
# Keys that say where a run reads and writes, or how it is displayed and computed, but do not change
# its result. The checksum stands for the data.
_NOT_OF_THE_RUN = (
    *("logger", "output_dir", "data_root", "resume", "dry_run", "cuda_graphs", "threads"),
    "keep_scores",
)
_NOT_OF_THE_DATA = ("dir", "raw_dir", "train", "test", "tests", "verify", "threads")
_ADDS_NOTHING = {"min_group_rows": 1, "test": True}  # keys left out of the settings at these values
_NOT_OF_THE_TRAINER = (
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
)
# Settings that a folder's name gives in its own words, or in the hash alone.
_NAMED = (
    *("data", "model", "seed", "mtn", "mtn.enabled", "noise", "noise.proportion"),
    *("regularizer", "regularizer.enabled", "regularizer.norm"),
)
_LONGEST_NAME = 120
_LONGEST_WORD = 32
CHECKPOINTS = "checkpoint_every_n_steps"  # for `ResumePoint`, not for Lightning's trainer


def result_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved config that determines the result.

    Of a part that is switched off, no other key counts: runs without MTN are the same run at every
    ``mtn.lam``.
    """
    settings = {
        key: redact(value, key) for key, value in config.items() if key not in _NOT_OF_THE_RUN
    }
    for part, keys in (("data", _NOT_OF_THE_DATA), ("trainer", _NOT_OF_THE_TRAINER)):
        settings[part] = {key: v for key, v in settings[part].items() if key not in keys}
    if not config["mtn"]["enabled"]:
        settings["mtn"] = {"enabled": False}
    elif settings["mtn"].get("norm") != "capped":
        settings["mtn"] = {key: v for key, v in settings["mtn"].items() if key != "cap"}
    _leave_out_defaults(settings)
    # MTN recomputes its factors at each checkpoint; nothing else depends on the interval.
    if not config["mtn"]["enabled"] or not config["trainer"].get(CHECKPOINTS):
        settings["trainer"].pop(CHECKPOINTS, None)
    settings["noise"] = _noise_settings(settings["noise"])
    # Their order matters, their names do not.
    if isinstance(callbacks := settings.get("callbacks"), Mapping):
        settings["callbacks"] = list(callbacks.values())
    return settings


def _leave_out_defaults(settings: dict[str, Any]) -> None:
    """Delete the groups and keys that add nothing, so that runs of before they existed count."""
    for key, value in _ADDS_NOTHING.items():
        if settings.get(key) == value:
            del settings[key]
    own = settings.get("regularizer")
    if isinstance(own, Mapping) and own.get("enabled") is False:
        del settings["regularizer"]
    for group in _OPTIONAL:
        if group in settings and settings[group] in (None, {}, [], _DEFAULTS.get(group)):
            del settings[group]


def _noise_settings(noise: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the noise that count."""
    flips = label_flips(noise)
    of_labels: dict[str, Any] = {"label_flip": flips} if flips else {}
    if noise["proportion"]:
        return {key: value for key, value in noise.items() if key != "label_flip"} | of_labels
    if flips:
        of_labels |= {key: noise[key] for key in ("splits", "seed")}
    return {"proportion": 0, **of_labels}


def label_flips(noise: Mapping[str, Any]) -> dict[str, float]:
    """Return the flip probability of each label that has one, from the settings of the noise.

    >>> label_flips({"proportion": 0.1, "label_flip": {"click": 0.0, "conversion": 0.1}})
    {'conversion': 0.1}
    """
    flips = noise.get("label_flip") or {}  # absent from records of before it existed
    return {label: probability for label, probability in flips.items() if probability}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings by dotted key.

    >>> dict(flatten({"seed": 0, "mtn": {"lam": 1e-05, "layers": [0, 1]}}))
    {'seed': 0, 'mtn.lam': 1e-05, 'mtn.layers': [0, 1]}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def treatment_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each treatment of a run by its group: that of its norm or class.

    Args:
        settings: Output of :func:`result_settings`.

    >>> treatment_names({"mtn": {"enabled": True}, "regularizer": {"norm": "l2"}})
    {'mtn': 'mtn', 'regularizer': 'l2'}
    """
    own = {group: settings.get(group, {"enabled": False}) for group in TREATMENTS}
    return {
        group: "mtn" if group == "mtn" else _treatment_name(keys)
        for group, keys in own.items()
        if keys.get("enabled", True)
    }


def _treatment_name(settings: Mapping[str, Any]) -> str:
    target = str(settings.get("_target_", "")).rpartition(".")[2]
    return str(settings.get("norm", target.lower()))


def folder_name(config: Mapping[str, Any], swept: Mapping[str, Any] | None = None) -> str:
    """Return the name of a run folder: data, model, treatments, noise, swept settings, seed, hash.

    It has at most 120 characters, all of them letters, digits, ``.``, ``_`` or ``-``. Its end, from
    ``-seed`` on, depends on the settings that determine the result alone.

    Args:
        config: Resolved config.
        swept: Settings of the sweep or of the command line, by dotted key. Those that do not change
            the result are left out.
    """
    settings = result_settings(config)
    keys = {*settings, *(key for key, _ in flatten(settings))}
    shown = {key: value for key, value in (swept or {}).items() if _is_shown(key, keys)}
    ends = [key.rpartition(".")[2] for key in shown]
    words = [config["data"]["name"], config["model"]["_target_"].rpartition(".")[2].lower()]
    choices = {"mtn": str((swept or {}).get("mtn", "mtn"))}
    words += [choices.get(group, name) for group, name in treatment_names(settings).items()]
    proportion = config["noise"]["proportion"]
    words += [f"noise{proportion:g}"] if proportion else []
    words += _flip_words(config["noise"])
    for end, (key, value) in zip(ends, shown.items(), strict=True):
        words.append(f"{end if ends.count(end) == 1 else key}_{_word(value)}")
    name = "-".join(_safe(str(word))[:_LONGEST_WORD] for word in words)
    end = f"-seed{config['seed']}-{_hash(settings)[:8]}"
    return name[: _LONGEST_NAME - len(end)] + end


def _is_shown(key: str, keys: Collection[str]) -> bool:
    """Return whether a folder's name has a word for a key of the settings ``keys``."""
    is_setting = key in keys or any(other.startswith(f"{key}.") for other in keys)
    return is_setting and key not in _NAMED and not key.startswith("noise.label_flip")


def _flip_words(noise: Mapping[str, Any]) -> list[str]:
    return [f"flip_{label}_{share:g}" for label, share in label_flips(noise).items()]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('[]{}"')


def _safe(text: str) -> str:
    """Replace the characters that a shell, Hydra's grammar or a file system treats specially."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace('"', "")).strip("_")


@dataclass(frozen=True)
class RunIdentity:
    """Identity of a run: its hash, arm, baseline and names.

    Args:
        config: Resolved config.
        checksum: Checksum of the data set.
        seed_keys: Dotted config keys derived from the seed, including ``seed``: with
            ``noise.seed=${seed}`` each repeat has different noise, with
            ``data.generator_seed=${seed}`` a different data set, and the repeats still form one
            arm.
    """

    config: Mapping[str, Any]
    checksum: str
    seed_keys: Collection[str]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the result, nested as in the config."""
        return result_settings(self.config)

    @cached_property
    def id(self) -> str:
        """Hash of the settings and the data set's checksum."""
        return _hash([self.settings, self.checksum])

    @cached_property
    def arm_settings(self) -> dict[str, Any]:
        """Settings by dotted key, without those derived from the seed, and the checksum.

        Where the seed draws the data set, a hash of the data set's other settings stands for it.
        """
        flat = flatten(self.settings)
        settings = {key: _plain(value) for key, value in flat if key not in self.seed_keys}
        of_data = {key: value for key, value in settings.items() if key.startswith("data.")}
        checksum = f"per seed {_hash_flat(of_data)}" if self.draws_data else self.checksum
        return settings | {"checksum": checksum}

    @cached_property
    def draws_data(self) -> bool:
        """Whether each seed has a data set of its own."""
        drawn = {key.removeprefix("data.") for key in self.seed_keys if key.startswith("data.")}
        return bool(drawn - {"seed", "split_seed", *_NOT_OF_THE_DATA})

    @cached_property
    def baseline_settings(self) -> dict[str, Any]:
        """Settings of the arm without those of the treatments."""
        groups = tuple(f"{group}." for group in TREATMENTS)
        return {k: value for k, value in self.arm_settings.items() if not k.startswith(groups)}

    @cached_property
    def treatment_settings(self) -> dict[str, Any]:
        """Settings of the treatments; in a baseline, that they are off."""
        return {k: v for k, v in self.arm_settings.items() if k not in self.baseline_settings}

    @cached_property
    def arm(self) -> str:
        """Hash of the arm's settings."""
        return _hash_flat(self.arm_settings)

    @cached_property
    def baseline(self) -> str:
        """Hash that an arm and its baseline share."""
        return _hash_flat(self.baseline_settings)

    @cached_property
    def treatments(self) -> list[str]:
        """Treatments that the run has; empty in a baseline."""
        return list(treatment_names(self.settings))

    @cached_property
    def shown_settings(self) -> dict[str, Any]:
        """Settings with the command-line names of ``model`` and ``data``.

        Their keys move to ``model_settings`` and ``data_settings``.
        """
        return self.settings | {
            "model_settings": self.settings["model"],
            "data_settings": self.settings["data"],
            "model": self.config["model"]["_target_"].split(".")[-2],
            "data": self.config["data"]["name"],
        }

    @cached_property
    def tags(self) -> list[str]:
        """Data set, model, treatment and noise, one word each; one for each noisy label."""
        settings = self.shown_settings
        treatment = "+".join(treatment_names(self.settings).values()) or "baseline"
        return [str(settings["data"]), settings["model"], treatment, *self._noise_words]

    @cached_property
    def _noise_words(self) -> list[str]:
        noise = self.settings["noise"]
        words = [f"noise_{noise['proportion']:g}"] if noise["proportion"] else []
        return [*words, *_flip_words(noise)] or ["clean"]

    @cached_property
    def group(self) -> str:
        """Name of the arm."""
        words, noise = self.tags[:3], self._noise_words
        found = [self.settings[group].get("lam") for group in self.treatments]
        strengths = [f"lam={lam:g}" for lam in found if lam is not None]
        return " ".join([*words, *strengths, *noise, self.arm[:8]])

    @cached_property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.group} seed={self.config['seed']}"


def _plain(value: Any) -> Any:
    """Convert whole floats to integers: the command line gives 0 where a file gives 0.0."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hash_flat(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _hash(content: Any) -> str:
    # As text, since keys like 101 and `default` cannot be sorted together.
    as_text = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_text, sort_keys=True).encode()).hexdigest()[:16]
