"""Help of the commands: description, examples and keys, read from the comments in ``conf``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from rich import get_console
from rich.padding import Padding
from rich.table import Table

from mtnrec.command.config import CONF_DIR

_HYDRA_KEYS = ("defaults", "hydra")
WITHOUT_KEYS = {"compare": "Compare two runs: the settings that differ, and their metrics."}
_OPTIONS = {
    "-m, --multirun": "run every combination of listed values: seed=0,1,2",
    "--cfg job": "print the composed config",
    "--config-dir DIR": "folder of your own config files, laid out like conf",
    "--version": "print the version",
    "--hydra-help": "Hydra's own options",
}


@dataclass(frozen=True)
class Key:
    """One key of a config file.

    Args:
        name: Dotted name from the top of the file.
        default: Default as written in the file; empty for a mapping, whose keys follow.
        comment: Comment on the key's line or on the lines above it.
    """

    name: str
    default: str
    comment: str


def configured_commands() -> list[str]:
    """Return the names of the commands that take config keys: the files of ``conf``."""
    return sorted(path.stem for path in CONF_DIR.glob("*.yaml"))


def command_names() -> list[str]:
    """Return the names of all commands."""
    return sorted([*configured_commands(), *WITHOUT_KEYS])


def print_help(name: str, arguments: Sequence[str]) -> None:
    """Print the help of a command.

    Args:
        name: Name of the command.
        arguments: Arguments of the command line; the keys of each choice ``group=choice`` among
            them are listed too.
    """
    text = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    groups = read_groups(text)
    get_console().print("\n".join(read_head(text)), markup=False, highlight=False, soft_wrap=True)
    if groups:
        _print_rows(
            "Groups, as GROUP=CHOICE; add one to --help for its keys",
            [(group, default, ", ".join(_choices(group))) for group, default in groups.items()],
        )
    _print_keys("Keys, as KEY=VALUE", read_keys(text), "")
    for group, _, choice in (argument.partition("=") for argument in arguments):
        if group in groups and choice in _choices(group):
            keys = read_choice(CONF_DIR / group / f"{choice}.yaml")
            _print_keys(f"Keys of {group}={choice}", keys, f"{group}.")
    options = {key: text for key, text in _OPTIONS.items() if name == "train" or "-m" not in key}
    _print_rows("Options", [(option, "", text) for option, text in options.items()])


def print_version() -> None:
    """Print the version of the installed package."""
    try:
        version = metadata.version("mtnrec")
    except metadata.PackageNotFoundError:
        version = "(a checkout that is not installed)"
    get_console().print(f"mtnrec {version}", highlight=False)


def print_commands() -> None:
    """Print the commands with a sentence about each."""
    sentences = WITHOUT_KEYS | {
        name: read_head((CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8"))[0]
        for name in configured_commands()
    }
    usage = "mtnrec COMMAND [KEY=VALUE ...]; mtnrec compare RUN RUN; mtnrec COMMAND --help"
    get_console().print(usage, markup=False, highlight=False)
    _print_rows("Commands", [(name, "", sentences[name]) for name in command_names()])


def _print_keys(title: str, keys: Sequence[Key], prefix: str) -> None:
    shown = [key for key in keys if not key.name.rpartition(".")[2].startswith("_")]
    _print_rows(title, [(f"{prefix}{key.name}", key.default, key.comment) for key in shown])


def _print_rows(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for ratio in (None, None, 1):
        table.add_column(ratio=ratio, overflow="fold", min_width=8)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    get_console().print(f"\n{title}:", markup=False, highlight=False)
    get_console().print(Padding(table, (0, 0, 0, 2)), highlight=False)


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def read_head(text: str) -> list[str]:
    r"""Return the lines of a file's head comment, without their signs.

    >>> read_head("# @package _global_\n# Two lines,\n#   of a head.\na: 1\n")
    ['Two lines,', '  of a head.']
    """
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def read_groups(text: str) -> dict[str, str]:
    """Return the config groups of a command with their default choices."""
    defaults = yaml.safe_load(text).get("defaults", [])
    return {
        group: choice or "null"
        for entry in defaults
        if isinstance(entry, dict)
        for group, choice in entry.items()
        if not group.startswith(("override", "hydra"))
    }


def read_choice(path: Path) -> list[Key]:
    """Return the keys of a choice, those of the files that it builds on included."""
    text = path.read_text(encoding="utf-8")
    keys: dict[str, Key] = {}
    for base in base_files(text):
        if (file := path.parent / f"{base}.yaml").is_file():
            keys |= {key.name: key for key in read_choice(file)}
    return [*(keys | {key.name: key for key in read_keys(text)}).values()]


def base_files(text: str) -> list[str]:
    """Return the names of the files in the same group that a file builds on."""
    names = [entry for entry in yaml.safe_load(text).get("defaults", []) if isinstance(entry, str)]
    bases = [name for name in names if name != "_self_" and not name.endswith("_schema")]
    return [name.removesuffix("@_here_") for name in bases]


def read_keys(text: str) -> list[Key]:
    r"""Return the keys of a YAML file, except Hydra's own.

    >>> text = "a: 1  # one\n# Of all.\nb:  # two\n  c: [1, 2]\n"
    >>> [(key.name, key.default, key.comment) for key in read_keys(text)]
    [('a', '1', 'one'), ('b', '', 'Of all. two'), ('b.c', '[1, 2]', '')]
    """
    return list(_walk(yaml.compose(text), "", text.splitlines()))


def _walk(node: yaml.Node, prefix: str, lines: list[str]) -> Iterator[Key]:
    for name, start, value in _children(node, prefix):
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        line, column = (start if is_block else value.end_mark.line, value.end_mark.column)
        inline = (
            lines[line].partition(" #")[2] if is_block else lines[line][column:].partition("#")[2]
        )
        default = "" if is_block else lines[line][value.start_mark.column : column]
        comments = [_comment_above(start, lines), inline.strip()]
        if not is_block or any(comments):
            yield Key(name, default.strip(), " ".join(filter(None, comments)))
        if is_block:
            yield from _walk(value, name, lines)


def _children(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield the name, the line and the value of each key of a mapping or item of a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if prefix or key.value not in _HYDRA_KEYS:
                name = f"{prefix}.{key.value}" if prefix else key.value
                yield name, key.start_mark.line, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}[{index}]", value.start_mark.line, value


def _comment_above(line: int, lines: list[str]) -> str:
    """Return the comment directly above a key; the head comment of the file belongs to no key."""
    found: list[str] = []
    indent = len(lines[line]) - len(lines[line].lstrip())
    while line > 0 and lines[line - 1].startswith(" " * indent + "#"):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("#").strip())
    return "" if line == 0 else " ".join(found)
