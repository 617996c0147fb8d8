"""Secrets are hidden in what a run writes."""

import logging
import sys

import pytest

from mtnrec.run.identity import RunIdentity, result_settings
from mtnrec.run.secrets import HIDDEN, redact, redact_files, redact_log, redact_text

SECRET = "4f2a9c81d7e6"


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "apiKey", "WANDB_API_KEY", "token", "hf_token", "access_token", "key"),
        *("secret", "client_secret", "password", "db_passwd", "AUTH_TOKEN"),
    ],
)
def test_a_string_under_a_key_named_like_a_secret_is_hidden(key):
    assert redact({"logger": {key: "short"}}) == {"logger": {key: HIDDEN}}
    assert redact_text(f"logger.{key}={SECRET}") == f"logger.{key}={HIDDEN}"


@pytest.mark.parametrize("key", ["monkey", "tokens", "key_column", "group", "keys", "turkey"])
def test_other_keys_are_left_alone(key):
    assert redact({key: "user"}) == {key: "user"}


def test_numbers_nothing_and_interpolations_are_left_alone():
    config = {"embedding_dim": {"token": 8}, "password": None, "api_key": "${oc.env:MY_KEY}"}

    assert redact(config) == config


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)

    assert redact({"project": SECRET}) == {"project": HIDDEN}
    assert redact_text(f"cannot reach host/{SECRET}") == f"cannot reach host/{HIDDEN}"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (
            "+logger.settings={api_key:abc,offline:true}",
            "+logger.settings={api_key:#,offline:true}",
        ),
        ("Settings(api_key='abc')", "Settings(api_key=#)"),
        ('{"token": "abc"}', '{"token": #}'),
        ("data.train=logs/token=3/part.csv", "data.train=logs/token=3/part.csv"),
        ("optimizer.lr=0.1 seed=3", "optimizer.lr=0.1 seed=3"),
        ("a.token='${oc.env:T}',b.token=abc", "a.token='${oc.env:T}',b.token=#"),
        (r"a.token='it\'s me' seed=1", "a.token=# seed=1"),
        (r'a.token="say \"me\"" seed=1', "a.token=# seed=1"),
    ],
)
def test_assignments_in_texts_are_hidden(text, hidden):
    assert redact_text(text) == hidden.replace("#", HIDDEN)


def test_a_literal_that_was_once_seen_is_hidden_in_log_lines():
    redact({"api_key": "only-in-the-config"})
    record = logging.LogRecord("x", 30, "", 0, "refused: %s", ("only-in-the-config",), None)

    assert redact_log(record)
    assert record.getMessage() == f"refused: {HIDDEN}"


def test_a_traceback_in_the_log_is_hidden():
    try:
        raise ValueError(f"api_key={SECRET} is too short")
    except ValueError:
        record = logging.LogRecord("x", 40, "", 0, "failed", (), sys.exc_info())

    assert redact_log(record)
    text = logging.Formatter().format(record)
    assert f"ValueError: api_key={HIDDEN} is too short" in text
    assert text.count("4f2a") == 0


def test_the_files_of_hydra_keep_interpolations_and_lose_literals(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"a:\n  api_key: {SECRET}\nb:\n  token: ${{oc.env:TOKEN}}\n")

    redact_files(tmp_path)

    assert path.read_text() == f"a:\n  api_key: {HIDDEN}\nb:\n  token: ${{oc.env:TOKEN}}\n"


def test_a_run_is_the_same_with_any_key():
    def run(key):
        off = {"enabled": False}
        return {
            "data": {},
            "trainer": {},
            "noise": {"proportion": 0},
            "mtn": off,
            "model": {"api_key": key},
        }

    assert HIDDEN in str(result_settings(run(SECRET)))
    assert RunIdentity(run("a"), "1", ()).id == RunIdentity(run("b"), "1", ()).id
