"""Fields, labels and their sizes, shared by data and model."""

from dataclasses import dataclass
from typing import Any

from mtnrec.checks import InputError, check_flag, check_integer, format_names

MOST_COLUMNS = 10_000
_MOST_INDICES = 1 << 31
_LONGEST_NAME = 200  # bytes; a file name may have 255


@dataclass(frozen=True)
class CategoricalField:
    """One categorical field.

    Args:
        name: Column name, which also names the file of its vocabulary.
        vocabulary_size: Number of indices, which have 32 bits; index 0 stands for a missing or
            unseen value.

    Raises:
        InputError: If the name is not a valid file name or the size is out of range.
    """

    name: str
    vocabulary_size: int

    def __post_init__(self) -> None:
        _check_file_name(self.name)
        check_integer(
            f"the vocabulary size of {self.name!r}",
            self.vocabulary_size,
            minimum=1,
            maximum=_MOST_INDICES,
        )


@dataclass(frozen=True)
class Task:
    """Prediction task: a label on all or some rows.

    Args:
        name: Name, e.g. ``ctr``, the first half of its metrics' names.
        label: Column of the label.
        given: Column of the label that is 1 on the task's rows; None if all rows count.
    """

    name: str
    label: int
    given: int | None = None


def _check_file_name(name: Any) -> None:
    is_text = isinstance(name, str) and name.isprintable()
    if (
        not is_text
        or not name
        or "/" in name
        or name.startswith(".")
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise InputError(
            f"the categorical column {str(name)[:80]!r} must be a valid name for its vocabulary "
            f"file (no slash, no leading dot, at most {_LONGEST_NAME} bytes). Rename it."
        )


FUNNEL_TASKS = (Task("ctr", 0), Task("cvr", 1, given=0), Task("ctcvr", 1))


@dataclass(frozen=True)
class Schema:
    """The columns of a data set, in the order of the arrays.

    Args:
        categorical: The ``F`` categorical fields.
        numerical: Names of the ``N`` numerical features.
        labels: Names of the labels, one tower each.
        funnel: Whether the labels are the stages of a funnel, at least two: each label requires the
            one before it (click, then conversion, ``z <= y``). Otherwise the labels are independent
            and each is its own task.
        multivalued: The ``M`` multi-valued fields: a row has a bag of weighted tokens in each.
    """

    categorical: tuple[CategoricalField, ...]
    numerical: tuple[str, ...]
    labels: tuple[str, ...]
    funnel: bool
    multivalued: tuple[CategoricalField, ...] = ()

    def __post_init__(self) -> None:
        check_flag("funnel", self.funnel)
        fields = [field.name for field in (*self.categorical, *self.multivalued)]
        for names in ([*fields, *self.numerical], self.labels):
            if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
                raise InputError(
                    f"features and labels must have unique names, got {format_names(names)}"
                )
            if len(names) > MOST_COLUMNS:
                raise InputError(
                    f"features and labels must be at most {MOST_COLUMNS:,} each, got {len(names):,}"
                )
        if not self.labels or (self.funnel and len(self.labels) < 2):
            raise InputError(
                "a funnel must have at least two labels (click, conversion), and independent "
                f"labels must be at least one, got {list(self.labels)} with funnel={self.funnel}"
            )
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise InputError(f"tasks must have unique names, got {format_names(names)}")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that are measured.

        Two stages of a funnel give CTR, CVR and CTCVR. More stages give each label on all rows and,
        from the second on, given the label before it.

        >>> funnel = Schema((), ("price",), ("click", "conversion"), funnel=True)
        >>> [task.name for task in funnel.tasks]
        ['ctr', 'cvr', 'ctcvr']
        >>> funnel = Schema((), ("price",), ("click", "cart", "buy"), funnel=True)
        >>> [task.name for task in funnel.tasks]
        ['click', 'cart_given_click', 'cart', 'buy_given_cart', 'buy']
        >>> Schema((), ("price",), ("like", "share"), funnel=False).tasks[1]
        Task(name='share', label=1, given=None)
        """
        if self.funnel and len(self.labels) == 2:
            return FUNNEL_TASKS
        if self.funnel:
            first, *rest = (Task(label, column) for column, label in enumerate(self.labels))
            given = [
                Task(f"{task.name}_given_{self.labels[task.label - 1]}", task.label, task.label - 1)
                for task in rest
            ]
            pairs = zip(given, rest, strict=True)
            return (first, *(task for pair in pairs for task in pair))
        return tuple(Task(label, column) for column, label in enumerate(self.labels))

    def title(self, task: Task) -> str:
        """Return the name of a task in tables: CTR, CVR and CTCVR in capitals."""
        return task.name.upper() if task in FUNNEL_TASKS and self.funnel else task.name

    def definition(self, task: Task) -> str:
        """Describe which label a task predicts on which rows.

        >>> Schema((), ("price",), ("click", "conversion"), funnel=True).definition(FUNNEL_TASKS[1])
        'conversion where click = 1'
        """
        rows = "on all rows" if task.given is None else f"where {self.labels[task.given]} = 1"
        return f"{self.labels[task.label]} {rows}"
