"""Page of every config key with its default and comment, read from ``conf``."""

import re
from functools import cache
from pathlib import Path

import yaml

import mtnrec
from mtnrec.command.help import Key, base_files, read_groups, read_keys

# Config files of the commands, and the folders of conf in page order.
COMMANDS = (
    "train",
    "prepare",
    "describe",
    "predict",
    "evaluate",
    "export",
    "status",
    "report",
    "dashboard",
)
GROUPS = {
    "data": "Data",
    "model": "Models",
    "mtn": "MTN",
    "regularizer": "Regularisers",
    "loss": "Losses",
    "balance": "Balances",
    "noise": "Noise",
    "optimizer": "Optimisers",
    "scheduler": "Schedulers",
    "trainer": "Trainers",
    "logger": "Loggers",
    "callbacks": "Callbacks",
    "metrics": "Metrics",
    "hydra/launcher": "Launchers",
    "hydra/sweeper": "Sweepers",
}
_MARKUP = re.compile(r"[\\|*_<>\[\]{}$]")


def configuration_page(conf: Path) -> str:
    """Return the configuration page as Markdown."""
    parts = ["## Commands"]
    for name in COMMANDS:
        parts += [_section(conf / f"{name}.yaml", f"`python -m mtnrec.{name}`", "", intro="")]
    for folder, title in GROUPS.items():
        parts += [f"## {title}"]
        for path in _ordered(conf / folder):
            choice = f"`{folder}={path.stem}`" if path.parent == conf / folder else f"`{path.stem}`"
            parts += [_section(path, choice, f"{folder.replace('/', '.')}.", intro=_intro(path))]
    for folder, title in {"debug": "Debugging", "experiment": "Experiments"}.items():
        parts += [f"## {title}", f"`{folder}=NAME` is one of these files; each sets what it names."]
        for path in _ordered(conf / folder):
            text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
            is_choice = path.parent == conf / folder
            choice = f"{folder}={path.stem}" if is_choice else f"_base/{path.stem}"
            parts += [f"### `{choice}`", f"```yaml\n{text}```"]
    return "\n\n".join(parts) + "\n"


def _ordered(folder: Path) -> list[Path]:
    """Return a group's files; those that others build on come first."""
    files = list(folder.glob("*.yaml"))
    parts = {name for path in files for name in _base_files(path)}
    ordered = sorted(files, key=lambda path: (path.stem not in parts, path.stem))
    bases = {path: len(_base_files(path)) for path in folder.glob("_base/*.yaml")}
    return [*sorted(bases, key=bases.__getitem__), *ordered]


def _section(path: Path, title: str, prefix: str, intro: str) -> str:
    lines = [f"### {title}", intro]
    text = path.read_text(encoding="utf-8")
    keys = [*_config_groups(text), *(key for key in read_keys(text) if key.name != "_target_")]
    for name in _base_files(path):
        owner = "" if (path.parent / f"{name}.yaml").is_file() else "Hydra's "
        lines += [f"All keys of {owner}`{Path(name).name}`, and:"]
    if keys:
        rows = [f"| `{prefix}{key.name}` | {_code(key.default)} | {_cell(key)} |" for key in keys]
        table = ["| key | default | |", "|---|---|---|", *rows]
        lines += ["\n".join(["{.keys}", *table])]
    return "\n\n".join(line for line in lines if line)


def _intro(path: Path) -> str:
    """Return a file's head comment, followed by the class that the file builds."""
    text = path.read_text(encoding="utf-8")
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            head.append(line.removeprefix("#").strip())
    target = yaml.safe_load(text).get("_target_")
    public = _public_names().get(target)
    name = f"{{py:class}}`{public}`" if public else f"`{target}`"
    made = f"Builds {name}." if target else ""
    return f"{_escape(' '.join(head))} {made}".strip()


@cache
def _public_names() -> dict[str, str]:
    """Map the full name of each public class, its ``_target_``, to its name in the API."""
    found = {name: getattr(mtnrec, name) for name in mtnrec.__all__}
    return {f"{made.__module__}.{name}": f"mtnrec.{name}" for name, made in found.items()}


def _config_groups(text: str) -> list[Key]:
    """Return the config groups of a command with their default choices and comments."""
    comments = dict(re.findall(r"^  - (\w+):.*?# (.*)$", text, re.MULTILINE))
    return [
        Key(group, choice, f"group: {comments.get(group, 'a choice, below')}")
        for group, choice in read_groups(text).items()
    ]


def _base_files(path: Path) -> list[str]:
    """Return the names of the files in the same group that a file builds on."""
    return base_files(path.read_text(encoding="utf-8"))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(key: Key) -> str:
    return _escape(key.comment)


def _escape(text: str) -> str:
    """Escape Markdown markup outside code spans."""
    parts = text.split("`")
    parts[::2] = [_MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)
