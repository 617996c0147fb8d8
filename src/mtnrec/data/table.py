"""A custom table: any csv or Parquet file with a column per feature and label."""

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from mtnrec.checks import InputError, check_choice, check_flag, check_integer, check_number
from mtnrec.data.datamodule import SelfPreparing
from mtnrec.data.preparation.table import TableSettings, prepare_tables
from mtnrec.data.prepared.layout import test_splits
from mtnrec.data.prepared.manifest import LARGEST_NUMBER, Manifest
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.tabular import (
    ArrowStream,
    FrameSource,
    Source,
    check_dialect,
    check_table,
    is_frame,
    open_source,
)
from mtnrec.schema import Schema

_OTHER = ("origin", "name")  # do not determine the prepared bytes
_LISTS = ("labels", "categorical", "numerical", "exclude")
_TABLES = ("train", "test", "tests")
_GROUP_AS_FEATURE = {"data.categorical", "data.group"}  # the two roles that a column may share


@dataclass(kw_only=True, eq=False, repr=False)
class Table(SelfPreparing):
    """A custom table; training prepares it if its folder is missing.

    The kind of a column that ``categorical`` and ``numerical`` do not name is inferred from the
    values in ``train``, not from the type that stores them. Texts, booleans and whole numbers are
    categorical, numbers of which one has a fraction are numerical, lists are multi-valued (and the
    column ``NAME_weights`` of lists holds the weights of their items). Refused are dates, a column
    of more than 100 values that has as many values as rows (a row id), and a column in which most
    cells, but not all, are numbers or dates. If both are given, other columns are left out. Labels,
    group, time, excluded columns and pandas' index are never features.

    Categorical values are texts, one per value, whatever stores it (``3`` for 3.0, ``true`` for
    True, moments in UTC), numbered in byte order; missing, rare and unseen values have index 0.

    Args:
        dir: Folder of the prepared data set. If None, a table in memory uses a temporary
            folder that is deleted with this object; other processes and copies of this object
            create their own.
        train: ``.csv``, ``.tsv`` or ``.parquet`` file, a compressed one (``.csv.gz``,
            ``.csv.zst``), a pattern with ``*`` for several files, a folder of ``.parquet`` files,
            or a table in memory: a frame of pandas (without its index), polars, pyarrow or any
            library with the Arrow PyCapsule stream interface. If None, training uses what ``dir``
            holds; settings that are given must be those it was prepared with.
        test: Table of the test rows, as for ``train``; if None, ``split`` takes them from
            ``train``.
        tests: More test tables by name: ``{"random": FILE}`` makes the test set ``test_random``.
            They have the columns of ``train``, whose vocabularies and scales encode them.
        labels: Columns of 0 and 1 or true and false, without missing values; see ``positive``.
        funnel: Whether each label requires the one before it (click, conversion).
        categorical: Categorical columns; None to infer them.
        numerical: Numerical columns; None to infer them.
        exclude: Columns to leave out.
        group: Column of the user or search. Integers are kept, other values are numbered. It is a
            feature as well if ``categorical`` names it; other columns are still inferred if
            ``numerical`` is None.
        time: Column of numbers or dates (``YYYY-MM-DD``, ``YYYY-MM-DD HH:MM:SS``, with ``Z`` or
            ``+01:00`` if it has a zone, else in UTC); the rows of each split are sorted by it, so
            that ``validation_split=last`` validates on the latest training rows.
        split: ``random``, ``grouped`` (whole groups drawn at random) or ``time`` (the last rows).
        test_share: Share of the rows (or groups) in the test split, in (0, 1).
        test_seed: Seed of the random test split.
        fill: Replacement for missing numbers: a value, or ``mean`` for that of the training rows;
            None refuses missing numbers.
        standardise: Whether to store ``(value - mean) / deviation``, both of the filled training
            rows; a constant column is divided by 1.
        positive: Value of the labels that counts as 1, for example ``yes``, if they are not 0 and 1
            or true and false; then only one other value may occur. A list of values makes all
            others 0. Case is ignored.
        separator: Character between the cells of csv files; None to infer it.
        decimal: Decimal sign of the numbers in csv files, ``.`` or ``,``; None to infer it.
        min_count: Minimum number of training rows with a categorical value to give it an index.
        conversion_without_click: ``refuse`` a conversion without a click under ``funnel``,
            ``drop`` and count the row, or ``clear``, count it and keep the row without the
            conversion.
        on_error: ``refuse`` a row that breaks a rule, or ``skip`` and count it.
    """

    origin: ClassVar[str] = "It is made from your own table."

    name: str = "table"
    train: str | Path | ArrowStream | None = None
    test: str | Path | ArrowStream | None = None
    tests: Mapping[str, str | Path | ArrowStream] | None = None
    labels: list[str] | None = None
    funnel: bool = False
    categorical: list[str] | None = None
    numerical: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    group: str | None = None
    time: str | None = None
    split: str = "random"
    test_share: float = 0.2
    test_seed: int = 0
    fill: float | str | None = None
    standardise: bool = True
    positive: Any = None
    separator: str | None = None
    decimal: str | None = None
    min_count: int = 1
    conversion_without_click: str = "refuse"
    on_error: str = "refuse"

    def __new__(cls, **arguments: Any) -> "Table":
        table = super().__new__(cls)
        # Hydra passes every argument, given or not.
        table.given = set(arguments) if len(arguments) < len(fields(cls)) - 1 else set()
        return table

    def __post_init__(self) -> None:
        self._identities: dict[str, Any] | None = None  # of tables in memory: see _open
        self._check_tables()
        self._choose_folder()
        super().__post_init__()
        for key in _LISTS:
            if getattr(self, key) is not None:
                setattr(self, key, _names(f"data.{key}", getattr(self, key)))
        for key in ("group", "time"):
            if getattr(self, key) is not None:
                setattr(self, key, _names(f"data.{key}", [getattr(self, key)])[0])
        check_flag("data.funnel", self.funnel)
        check_flag("data.standardise", self.standardise)
        check_choice("data.split", self.split, ["random", "grouped", "time"])
        check_number("data.test_share", self.test_share, minimum=0, maximum=1, open_maximum=True)
        if self.test_share == 0:
            raise InputError(
                "data.test_share must be above 0, got 0. Set data.test to use a separate table."
            )
        check_integer("data.test_seed", self.test_seed, minimum=0)
        check_integer("data.min_count", self.min_count, minimum=1)
        if self.fill not in (None, "mean"):
            check_number("data.fill", self.fill, minimum=-LARGEST_NUMBER, maximum=LARGEST_NUMBER)
        remedies = ["refuse", "drop", "clear"]
        check_choice("data.conversion_without_click", self.conversion_without_click, remedies)
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)
        self._check_form()
        self._check_roles()
        self._find_given()

    def _find_given(self) -> None:
        for setting in fields(Table):
            default = setting.default
            if default is MISSING:
                default = [] if setting.default_factory is list else None
            value = getattr(self, setting.name)
            if setting.name not in _TABLES and value != default:
                self.given.add(setting.name)

    def _check_form(self) -> None:
        values = self.positive if isinstance(self.positive, list | tuple) else [self.positive]
        if any(isinstance(value, bool) for value in values):
            raise InputError(
                f"data.positive must be a text or a number, got {self.positive!r} (YAML reads yes "
                "and no as true and false). Quote it, or leave it out if labels are true and false."
            )
        self.separator = check_dialect("data.", self.separator, self.decimal)

    def _check_tables(self) -> None:
        if self.tests is not None and not isinstance(self.tests, Mapping):
            raise InputError(
                f"data.tests must be a mapping of names to tables, got {self.tests!r}. Set for "
                "example data.tests={random:FILE}."
            )
        for name in self.tests or {}:
            if not test_splits([f"test_{name}"]):
                raise InputError(
                    "data.tests must have names of lower-case letters, digits and _, got "
                    f"{name!r}. Rename it, for example random."
                )
        for key, given in self._tables.items():
            check_table(key, given)

    @property
    def _tables(self) -> dict[str, Any]:
        """The tables that are given, by the key that gives them."""
        more = {f"data.tests.{name}": given for name, given in (self.tests or {}).items()}
        found = {"data.train": self.train, "data.test": self.test, **more}
        return {key: given for key, given in found.items() if given is not None}

    def _choose_folder(self) -> None:
        """Create a temporary folder for a table in memory, unless ``dir`` is given."""
        in_memory = any(map(is_frame, self._tables.values()))
        self._is_temporary = in_memory and self.dir is None
        if self._is_temporary:
            temporary = tempfile.TemporaryDirectory(prefix="mtnrec-", ignore_cleanup_errors=True)
            weakref.finalize(self, temporary.cleanup)
            self.dir = Path(temporary.name, self.name)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        return state | {"dir": None, "_verified": False} if self._is_temporary else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.dir is None:
            self._choose_folder()

    def _check_roles(self) -> None:
        roles: dict[str, str] = {}
        for key, names in self.named.items():
            for name in names:
                if name in roles and {roles[name], key} != _GROUP_AS_FEATURE:
                    raise InputError(
                        f"the column {name!r} must have one role, got {roles[name]} and {key}. "
                        "Delete it from one of them."
                    )
                roles[name] = key
        if self.labels is not None:
            Schema((), (), tuple(self.labels), self.funnel)  # raises on a wrong number of labels
        if self.train is None and (given := [*self._tables]):
            raise InputError(
                f"{given[0]} must come with data.train, got {given[0]} alone. Set both."
            )
        needed = {"grouped": "group", "time": "time"}.get(self.split)
        if self.test is None and needed is not None and getattr(self, needed) is None:
            raise InputError(f"data.split={self.split} needs a column. Set data.{needed}=COLUMN.")

    @property
    def named(self) -> dict[str, list[str]]:
        """Columns that each setting names."""
        named = {f"data.{key}": getattr(self, key) or [] for key in _LISTS}
        for key in ("group", "time"):
            if getattr(self, key) is not None:
                named[f"data.{key}"] = [getattr(self, key)]
        return named

    def _how_to_prepare(self) -> str:
        if self.train is not None:
            return super()._how_to_prepare()
        return (
            f"Then: python -m mtnrec.prepare data=table data.name={self.name} data.train=FILE "
            "data.labels=[COLUMN,COLUMN]"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings, and the identity of each table: names and hashes of files, hashes of frames.

        A hash of a frame dates from the last time that ``prepare`` read it; that of a file is
        computed again if the file has changed.
        """
        identities = self._identities
        if identities is None:
            identities = {k: source.identity(self._checksum) for k, source in self._open().items()}
        more = {
            split.removeprefix("test_"): identity
            for split, identity in identities.items()
            if split not in ("train", "test")
        }
        return {
            **{key: getattr(self, key) for key in self._settings},
            "train": identities["train"],
            "test": identities.get("test"),
            **({"tests": more} if more else {}),
        }

    @property
    def _settings(self) -> list[str]:
        return [key for key in Table.__annotations__ if key not in (*_OTHER, *_TABLES)]

    def _find_differing(self, found: dict[str, Any]) -> dict[str, Any]:
        if self.train is not None:
            more = {} if "tests" in self.parameters or "tests" not in found else {"tests": None}
            return super()._find_differing(found) | more
        given = {key: getattr(self, key) for key in self._settings if key in self.given}
        return {
            key: value
            for key, value in given.items()
            if value is not None and found.get(key) != _unquoted(value, found.get(key))
        }

    def settings_used(self) -> dict[str, Any]:
        if self.train is not None:
            return {}
        try:
            found = open_prepared(self.folder)[0].parameters
        except InputError:
            return {}
        return {key: found[key] for key in self._settings if key in found}

    def setup(self, stage: str | None = None) -> None:
        if self._is_temporary and self._arrays is None:
            self.prepare_data()  # Lightning calls it in only one process per machine
        super().setup(stage)

    def prepare_data(self) -> None:
        """Prepare ``train`` if the folder is missing or empty; without ``train``, use the folder.

        Raises:
            InputError: If the folder was prepared with different settings or tables.
        """
        if self.train is None:
            super(SelfPreparing, self).prepare_data()
        else:
            super().prepare_data()

    def prepare(self) -> Manifest:
        """Read the table and write the prepared data set.

        Raises:
            InputError: If a setting or the table breaks a rule.
        """
        sources = self._open()
        values = {key.name: getattr(self, key.name) for key in fields(TableSettings)}
        return prepare_tables(self.folder, TableSettings(**values), sources)

    def _open(self) -> dict[str, Source]:
        if self.train is None or self.labels is None:
            raise InputError(
                "data.train and data.labels must be given. Set them to the table and its columns "
                "of 0 and 1, `data.train=FILE data.labels=[COLUMN,COLUMN]`."
            )
        form = self.separator, self.decimal
        sources = {
            key.removeprefix("data.").replace("tests.", "test_"): open_source(key, given, *form)
            for key, given in self._tables.items()
        }
        self._unquote_names(sources["train"].columns)
        for source in sources.values():
            for key, names in self.named.items():
                if key != "data.exclude" or source is sources["train"]:
                    source.require_columns(key, names)
        if any(isinstance(source, FrameSource) for source in sources.values()):
            # Cached: reading a frame again is slow, and a stream cannot be read twice.
            self._identities = {k: source.identity(self._checksum) for k, source in sources.items()}
        return sources

    def _unquote_names(self, columns: list[str]) -> None:
        """Undo that YAML and Hydra read the name 109_14 as the number 10914."""
        for key in _LISTS:
            if getattr(self, key) is not None:
                setattr(self, key, _unquoted(getattr(self, key), columns))
        for key in ("group", "time"):
            if getattr(self, key) is not None:
                setattr(self, key, _unquoted([getattr(self, key)], columns)[0])


def _names(key: str, names: Any) -> list[str]:
    """Return a list of column names; one name is a list of one."""
    if isinstance(names, str):
        return [names]
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str | int) and not isinstance(name, bool) for name in names
    ):
        raise InputError(
            f"{key} must name columns, `{key}=[COLUMN,COLUMN]`, got {names!r}. Quote a name that "
            f"is read as a number or as true, `{key}=['1e3']`."
        )
    return [str(name) for name in names]


def _unquoted(names: Any, columns: Any) -> Any:
    """Replace 10914 with the column 109_14, if there is one and none is called 10914."""
    if not isinstance(names, list) or not isinstance(columns, list):
        return names
    by_number = {str(name).replace("_", ""): name for name in columns if str(name)[:1].isdigit()}
    return [name if name in columns else by_number.get(name, name) for name in names]
