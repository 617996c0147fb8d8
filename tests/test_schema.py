"""Tasks and labels."""

import pytest

from mtnrec.checks import InputError
from mtnrec.schema import Schema, Task


def test_a_funnel_measures_conversion_on_clicks_and_on_all_rows():
    schema = Schema((), ("price",), ("view", "buy"), funnel=True)

    definitions = {task.name: schema.definition(task) for task in schema.tasks}

    assert definitions == {
        "ctr": "view on all rows",
        "cvr": "buy where view = 1",
        "ctcvr": "buy on all rows",
    }


def test_independent_labels_are_measured_on_all_rows():
    schema = Schema((), ("price",), ("like", "share", "buy"), funnel=False)

    assert schema.tasks == (Task("like", 0), Task("share", 1), Task("buy", 2))
    assert schema.definition(schema.tasks[2]) == "buy on all rows"


@pytest.mark.parametrize(
    ("labels", "funnel"),
    [((), False), ((), True), (("click",), True)],
)
def test_a_wrong_number_of_labels_is_refused(labels, funnel):
    message = rf"at least two labels .* at least one, got \[.*\] with funnel={funnel}"
    with pytest.raises(InputError, match=message):
        Schema((), ("price",), labels, funnel)
