import math
import random

import numpy as np
import pytest
import scipy.stats

from mtnrec.checks import InputError
from mtnrec.tuning.record import Budget, Trial, TunedArm, Tuning
from mtnrec.tuning.search import Search
from mtnrec.tuning.space import Choice, Range

optuna = pytest.importorskip("optuna", minversion="4", exc_type=ImportError)

SPACE = {
    "optimizer.lr": Range(1e-5, 1e-1, log=True),
    "model.dropout": Range(0.0, 0.5),
    "mtn.coupling": Choice(("gradient", "decoupled")),
}
FAILED = {3, 11}  # numbers of trials


def loss(setting):
    distance = math.log10(setting["optimizer.lr"]) + 3
    return distance**2 + setting["model.dropout"] + (setting["mtn.coupling"] == "gradient")


def outcomes(settings, number):
    return [None if number + k in FAILED else loss(own) for k, own in enumerate(settings)]


def replay(trials, *, batch=1, told=None):
    """Run a search until ``told`` trials are told, and return all that it asked."""
    search, asked = Search(SPACE, trials=trials, batch=batch, seed=7), []
    while settings := search.ask():
        asked += settings
        if told is not None and len(asked) > told:
            break
        search.tell(outcomes(settings, len(asked) - len(settings)))
    return search, asked


def plain(trials, batch, first):
    """Ask and tell as Optuna's documentation does, maximising, after the trials ``first``."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=7), direction="maximize")
    asked = []
    while len(asked) < trials:
        opened = []
        for _ in range(min(batch, trials - len(asked))):
            if len(study.trials) < len(first):
                study.enqueue_trial(first[len(study.trials)])
            trial = study.ask()
            trial.suggest_float("optimizer.lr", 1e-5, 1e-1, log=True)
            trial.suggest_float("model.dropout", 0.0, 0.5)
            trial.suggest_categorical("mtn.coupling", ["gradient", "decoupled"])
            opened.append(trial)
        for trial in opened:
            asked.append(trial.params)
            if trial.number in FAILED:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, -loss(trial.params))
    return asked


@pytest.mark.parametrize("batch", [1, 4])
def test_a_search_asks_what_a_plain_optuna_loop_with_the_same_seed_asks(batch):
    asked = replay(25, batch=batch)[1]

    assert asked == plain(25, batch, asked[:10])
    assert len(asked) == 25


def test_arms_that_search_a_key_draw_the_same_values_of_it():
    wide = SPACE | {"mtn.lam": Range(1e-6, 1e-1, log=True)}

    narrow, wider = (Search(space, trials=12, batch=12, seed=7).ask() for space in (SPACE, wide))

    shared = [{key: setting[key] for key in SPACE} for setting in wider]
    assert shared[:10] == narrow[:10]
    assert shared[10:] != narrow[10:]
    assert len({setting["mtn.lam"] for setting in wider}) == 12


def test_random_trials_cover_each_range_evenly():
    found = [Search(SPACE, trials=1, seed=seed).ask()[0] for seed in range(400)]

    rates = (np.log10([setting["optimizer.lr"] for setting in found]) + 5) / 4
    dropouts = np.array([setting["model.dropout"] for setting in found]) / 0.5
    assert scipy.stats.kstest(rates, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(dropouts, "uniform").pvalue > 0.01
    assert abs(scipy.stats.spearmanr(rates, dropouts).statistic) < 0.15
    gradient = sum(setting["mtn.coupling"] == "gradient" for setting in found)
    assert scipy.stats.binomtest(gradient, 400).pvalue > 0.01


def test_a_search_that_is_told_the_same_again_asks_the_same_whenever_it_stopped():
    _, whole = replay(14, batch=2)

    for told in range(14):
        search, asked = replay(14, batch=2, told=told)
        assert asked == whole[: len(asked)]
        assert search.ask() == asked[-2:]  # the open batch, until it is told


def test_more_trials_continue_the_same_search():
    assert replay(20)[1][:12] == replay(12)[1]


def test_losses_change_what_is_asked_only_after_ten_random_trials():
    told = [[1.0] * 13, [float(number % 3) for number in range(13)]]
    asked = []
    for losses in told:
        search = Search(SPACE, trials=13, seed=0)
        for value in losses:
            asked.append(search.ask()[0])
            search.tell([value])

    assert asked[:10] == asked[13:23]
    assert asked[10:13] != asked[23:]


def test_the_importance_finds_the_one_key_that_matters():
    search = Search(SPACE, trials=30, seed=0)
    while settings := search.ask():
        search.tell([abs(math.log10(settings[0]["optimizer.lr"]) + 3)])

    found = search.importance()

    assert list(found) == list(SPACE)
    assert sum(found.values()) == pytest.approx(1)
    assert found["optimizer.lr"] > 0.7


def test_losses_that_are_all_equal_say_nothing_about_importance():
    search = Search(SPACE, trials=5, seed=0)
    while search.ask():
        search.tell([0.5])

    assert search.importance() == {}


@pytest.mark.parametrize("version", ["2.10.1", "3.6.0"])
def test_an_older_optuna_is_refused(version, monkeypatch):
    monkeypatch.setattr(optuna, "__version__", version)

    with pytest.raises(InputError, match=rf"Optuna 4, got {version}\. Install it: pip install"):
        Search(SPACE, trials=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Range(0.5, 0.1), r"lower one first, got interval\(0.5,0.1\)\. Swap"),
        (lambda: Range(0.1, 0.1), "finite ends, the lower one first"),
        (lambda: Range(0.0, math.inf), "finite ends"),
        (lambda: Range(math.nan, 1.0), "finite ends"),
        (lambda: Range(0.0, 1.0, log=True), r"begin above 0, got tag\(log,interval\(0,1\)\)"),
        (lambda: Range(-1.0, 1.0, log=True), "begin above 0"),
        (lambda: Choice(("a",)), r"two or more different values, got choice\(a\)"),
        (lambda: Choice(("a", "b", "a")), "two or more different values"),
    ],
)
def test_a_wrong_space_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def arm(values, better="higher", name="mtn", place="p", fresh=()):
    trials = [Trial(f"{name}-{number}", {"k": 0.1}, value) for number, value in enumerate(values)]
    budget = Budget(len(values), 1, 0, 0)
    folders = {str(seed): folder for seed, folder in enumerate(fresh)}
    return TunedArm(
        name, False, place, [], {}, budget, "val/cvr_auc", better, trials, fresh=folders
    )


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_best_trial_is_the_first_with_the_best_value(better):
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([None, 0.1, 0.2, 0.3]) for _ in range(6)]
        known = [value for value in values if value is not None]
        best = arm(values, better).best
        if not known:
            assert best is None
        else:
            expected = max(known) if better == "higher" else min(known)
            assert best.folder == f"mtn-{values.index(expected)}"


def test_a_record_of_a_sweep_is_read_as_it_was_written(tmp_path):
    written = Tuning([arm([0.1, None, 0.3], fresh=["a", "b"])], ["old"])

    written.write(tmp_path)

    found = Tuning.read(tmp_path / "tuning.json")
    assert (list(found.arms), list(found.superseded)) == (written.arms, written.superseded)
    assert Tuning.read(tmp_path / "none.json") == Tuning()


def test_a_later_search_replaces_the_earlier_one_of_its_arm_and_place_alone():
    first = Tuning().replace([arm([0.1], fresh=["a", "b"]), arm([0.1], name="plain", fresh=["c"])])

    second = first.replace([arm([0.1, 0.2], fresh=["b", "d"])])
    elsewhere = second.replace([arm([0.1], place="q", fresh=["e"])])

    assert [(one.arm, len(one.trials)) for one in second.arms] == [("plain", 1), ("mtn", 2)]
    assert second.superseded == ["a"]
    assert [one.place for one in elsewhere.arms] == ["p", "p", "q"]
    assert elsewhere.superseded == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not the record of a tuned sweep"),
        ('{"format_version": 2}', "format version 2, not 1"),
        ('{"format_version": 1, "arms": [{"arm": "x"}]}', "not the record of a tuned sweep"),
        ('{"format_version": 1, "superseded": ["../x"]}', "must name folders below its own"),
        ('{"format_version": 1, "superseded": ["/x"]}', "must name folders below its own"),
    ],
)
def test_a_record_of_another_shape_is_refused(content, message, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(content)

    with pytest.raises(InputError, match=message):
        Tuning.read(path)


def test_the_samplers_draws_fill_a_range_evenly_on_its_scale():
    search, drawn = Search(SPACE, trials=400, batch=400, seed=0), {}
    for setting in search.ask():  # no loss is told, so all are random
        for key, value in setting.items():
            drawn.setdefault(key, []).append(value)

    rates = np.log10(drawn["optimizer.lr"])
    assert np.mean(rates) == pytest.approx(-3, abs=0.25)
    assert np.mean(drawn["model.dropout"]) == pytest.approx(0.25, abs=0.03)
    assert drawn["mtn.coupling"].count("gradient") == pytest.approx(200, abs=40)
