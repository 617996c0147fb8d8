import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mtnrec.checks import InputError
from mtnrec.schema import Schema
from mtnrec.training.selection import StopAfterDecreases, monitor_mode, selection_callbacks

INDEPENDENT = Schema((), ("price",), ("like", "share"), funnel=False)
BOTH_CLASSES = [[0, 0], [1, 0], [1, 1]]


def callbacks(schema, labels, directory, monitor="val/cvr_auc", patience=3, stop="patience"):
    labels = np.array(labels, np.uint8).reshape(-1, 2)
    return selection_callbacks(
        monitor, patience, directory, stop=stop, schema=schema, validation_labels=labels
    )


def test_a_monitor_on_the_test_set_is_refused_and_the_validation_one_named(funnel_schema):
    remedy = r"monitor=test/cvr_auc would choose the epoch on the test set.*monitor=val/cvr_auc\.$"

    with pytest.raises(InputError, match=remedy):
        monitor_mode("test/cvr_auc", funnel_schema)


@pytest.mark.parametrize("monitor", ["val/cvr", "cvr_auc", "val/like_auc", "train/loss", ""])
def test_an_unknown_monitor_lists_the_allowed_ones(monitor, funnel_schema):
    with pytest.raises(InputError) as error:
        monitor_mode(monitor, funnel_schema)

    message = str(error.value)
    assert message.endswith(f"got {monitor!r}")
    for task in ("ctr", "cvr", "ctcvr"):
        for metric in ("auc", "log_loss", "ece"):
            assert f"val/{task}_{metric}" in message


def test_independent_labels_have_their_own_monitors():
    assert monitor_mode("val/share_auc", INDEPENDENT) == "max"

    with pytest.raises(InputError, match=re.escape("val/like_auc, val/like_log_loss")):
        monitor_mode("val/cvr_auc", INDEPENDENT)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/cvr_auc", "max"),
        ("val/ctr_log_loss", "min"),
        ("val/cvr_ece", "min"),
        ("val/mean_auc", "max"),
    ],
)
def test_an_auc_is_maximised_and_errors_are_minimised(monitor, mode, funnel_schema, tmp_path):
    best, followers = callbacks(funnel_schema, BOTH_CLASSES, tmp_path, monitor=monitor)

    assert followers[0] is best
    assert isinstance(best, ModelCheckpoint)
    assert isinstance(followers[1], EarlyStopping)
    for follower in followers:
        assert (follower.monitor, follower.mode) == (monitor, mode)


def test_the_best_epoch_is_kept_in_the_folder_of_the_run(funnel_schema, tmp_path):
    best, (_, stopping) = callbacks(funnel_schema, BOTH_CLASSES, tmp_path, patience=7)

    assert best.format_checkpoint_name({}) == str(tmp_path / "checkpoints" / "best.ckpt")
    assert best.save_top_k == 1
    assert stopping.patience == 7


def stopped_at(stopping, curve):
    """The epoch after which a training with these values of the monitor stops, or None."""
    for epoch, value in enumerate(curve):
        if stopping._evaluate_stopping_criteria(torch.tensor(value))[0]:
            return epoch
    return None


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_papers_rule_stops_after_three_decreases_in_a_row(mode):
    rng = np.random.default_rng(0)
    sign = 1 if mode == "max" else -1
    for _ in range(200):
        curve = sign * rng.integers(0, 6, 25) / 6  # a tie is not a decrease
        falls = "".join("01"[int(sign * step < 0)] for step in np.diff(curve))
        expected = falls.find("111") + 3 if "111" in falls else None

        stopping = StopAfterDecreases("val/cvr_auc", patience=3, mode=mode)

        assert stopped_at(stopping, curve) == expected


def test_the_papers_rule_continues_where_patience_stops():
    jumping = [0.7, 0.6, 0.65, 0.6, 0.65, 0.64, 0.63, 0.62, 0.61]

    assert stopped_at(StopAfterDecreases("val/cvr_auc", patience=3, mode="max"), jumping) == 7
    falling = [0.5, 0.8, 0.7, 0.6, 0.55, 0.5]
    assert stopped_at(StopAfterDecreases("val/cvr_auc", patience=3, mode="max"), falling) == 4


def test_the_papers_rule_resumes_from_a_checkpoint():
    curve = [0.7, 0.6, 0.5, 0.4]
    first = StopAfterDecreases("val/cvr_auc", patience=3, mode="max")
    assert stopped_at(first, curve[:3]) is None

    second = StopAfterDecreases("val/cvr_auc", patience=3, mode="max")
    second.load_state_dict(first.state_dict())

    assert stopped_at(second, curve[3:]) == 0


@pytest.mark.parametrize("rule", [EarlyStopping, StopAfterDecreases])
def test_a_monitor_that_is_not_finite_stops_the_training_under_both_rules(rule):
    stopping = rule("val/ctr_log_loss", patience=3, mode="min")

    assert stopped_at(stopping, [0.5, 0.4, float("inf"), 0.3]) == 2


def test_an_unknown_rule_is_refused(funnel_schema, tmp_path):
    with pytest.raises(InputError, match="stop must be one of patience, decreased; got 'early'"):
        callbacks(funnel_schema, BOTH_CLASSES, tmp_path, stop="early")


@pytest.mark.parametrize("patience", [0, -1, 1.5, True])
def test_a_patience_below_one_epoch_is_refused(patience, funnel_schema, tmp_path):
    message = f"patience must be an integer >= 1, got {patience}"

    with pytest.raises(InputError, match=re.escape(message)):
        callbacks(funnel_schema, BOTH_CLASSES, tmp_path, patience=patience)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([[0, 0], [1, 0], [1, 0]], "0 positives among 2 rows (conversion where click = 1)"),
        ([[0, 0], [1, 1], [1, 1]], "2 positives among 2 rows (conversion where click = 1)"),
        ([[0, 0], [0, 0]], "0 positives among 0 rows (conversion where click = 1)"),
        ([], "0 positives among 0 rows (conversion where click = 1)"),
    ],
)
def test_labels_of_one_class_stop_nothing_early_and_warn_with_a_remedy(
    labels, problem, funnel_schema, tmp_path, caplog
):
    last, followers = callbacks(funnel_schema, labels, tmp_path)

    assert followers == [last]
    assert last.monitor is None
    assert last.format_checkpoint_name({}) == str(tmp_path / "checkpoints" / "best.ckpt")
    (warning,) = caplog.messages
    assert f"val/cvr_auc is undefined: the validation set has {problem}" in warning
    assert "the last epoch is tested" in warning
    assert "Choose another monitor, a larger data.validation_share, or more rows" in warning


def test_one_class_suffices_for_a_log_loss(funnel_schema, tmp_path, caplog):
    labels = [[0, 0], [1, 0]]

    best, followers = callbacks(funnel_schema, labels, tmp_path, monitor="val/cvr_log_loss")

    assert (best.monitor, len(followers)) == ("val/cvr_log_loss", 2)
    assert caplog.messages == []


def test_the_classes_of_another_task_do_not_matter(funnel_schema, tmp_path, caplog):
    labels = [[0, 0], [1, 0]]  # CTR has both classes, CVR has one

    best, _ = callbacks(funnel_schema, labels, tmp_path, monitor="val/ctr_auc")

    assert best.monitor == "val/ctr_auc"
    assert caplog.messages == []


def test_a_label_whose_name_begins_with_another_is_not_confused_with_it(tmp_path, caplog):
    schema = Schema((), ("price",), ("like", "like_video"), funnel=False)

    callbacks(schema, [[0, 0], [1, 0]], tmp_path, monitor="val/like_video_auc")

    (warning,) = caplog.messages
    assert "0 positives among 2 rows (like_video on all rows)" in warning


def test_the_mean_auc_is_undefined_where_that_of_one_task_is(funnel_schema, tmp_path, caplog):
    labels = [[0, 0], [1, 0]]  # CTR has both classes, CVR has one

    last, _ = callbacks(funnel_schema, labels, tmp_path, monitor="val/mean_auc")

    assert last.monitor is None
    (warning,) = caplog.messages
    assert "val/mean_auc is undefined" in warning
    assert "0 positives among 1 rows (conversion where click = 1)" in warning
