"""What data and model share: fields, labels and their sizes."""

from dataclasses import dataclass

from mtnrec.checks import InputError


@dataclass(frozen=True)
class CategoricalField:
    """One categorical field.

    Args:
        name: Column name.
        vocabulary_size: Number of indices; index 0 stands for a missing or unseen value.
    """

    name: str
    vocabulary_size: int


@dataclass(frozen=True)
class Task:
    """Something that is measured: a label on some rows.

    Args:
        name: ``ctr`` say; the first half of its metrics' names.
        label: Column of the label.
        given: Column of the label that is 1 on the task's rows; None if all rows count.
    """

    name: str
    label: int
    given: int | None = None


FUNNEL_TASKS = (Task("ctr", 0), Task("cvr", 1, given=0), Task("ctcvr", 1))


@dataclass(frozen=True)
class Schema:
    """The columns of a data set, in the order of the arrays.

    Args:
        categorical: The ``F`` categorical fields.
        numerical: Names of the ``N`` numerical features.
        labels: Names of the labels, one tower each.
        funnel: Whether the two labels are a funnel (click, then conversion, ``z <= y``). Without a
            funnel the labels are independent and each is a task of its own.
        multivalued: The ``M`` multi-valued fields: a row has a bag of weighted tokens in each.
    """

    categorical: tuple[CategoricalField, ...]
    numerical: tuple[str, ...]
    labels: tuple[str, ...]
    funnel: bool
    multivalued: tuple[CategoricalField, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels or (self.funnel and len(self.labels) != 2):
            raise InputError(
                "a funnel has two labels (click, conversion) and independent labels are at least "
                f"one, got {list(self.labels)} with funnel={self.funnel}"
            )

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is measured.

        >>> funnel = Schema((), ("price",), ("click", "conversion"), funnel=True)
        >>> [task.name for task in funnel.tasks]
        ['ctr', 'cvr', 'ctcvr']
        >>> Schema((), ("price",), ("like", "share"), funnel=False).tasks[1]
        Task(name='share', label=1, given=None)
        """
        if self.funnel:
            return FUNNEL_TASKS
        return tuple(Task(label, column) for column, label in enumerate(self.labels))

    def definition(self, task: Task) -> str:
        """Say which label a task predicts on which rows.

        >>> Schema((), ("price",), ("click", "conversion"), funnel=True).definition(FUNNEL_TASKS[1])
        'conversion where click = 1'
        """
        rows = "on all rows" if task.given is None else f"where {self.labels[task.given]} = 1"
        return f"{self.labels[task.label]} {rows}"
