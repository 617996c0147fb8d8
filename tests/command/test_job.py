import shlex
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mtnrec.command.config import CONF_DIR
from mtnrec.command.job import quote_for_ranks, train_command

FOLDERS = [
    *("runs/a", "/home/josé/runs", "runs/a,b", "a=b", "o d=1,2 [é]", "it's", 'say "a"', "both '\""),
    *("{a}", "(a)", "a&b", "#a", "a~b!;<^`", "back\\slash", "end\\", 'quote\\"', "${seed}", "$a"),
    *(r"a\${seed}", r'"\\${seed}\"'),
    *("true", "null", "1e3", "1_000", " a ", "a:b", "点击", "a\tb", "*.x", "@a", "choice(a,b)"),
]


def make_hydra(**changes):
    hydra = {
        "overrides": {"hydra": ["hydra.mode=MULTIRUN", "hydra.sweep.dir=runs", "hydra.job.name=x"]},
        "runtime": {
            "config_sources": [
                {"provider": "hydra", "path": "hydra.conf"},
                {"provider": "main", "path": str(CONF_DIR)},
            ]
        },
        "job": {"config_name": "train"},
    }
    return OmegaConf.create(hydra | changes)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_command_names_a_folder_of_any_name(name):
    line = shlex.join(train_command(name, ["seed=0"], make_hydra()))

    arguments = shlex.split(line)[3:]
    mode, place, job, seed = OverridesParser.create().parse_overrides(arguments)
    value = OmegaConf.create({"seed": 1, "dir": place.value()}).dir
    assert (mode.input_line, seed.input_line) == ("hydra.mode=RUN", "seed=0")
    assert place.key_or_group == "hydra.run.dir"
    assert value == name
    assert job.input_line == "hydra.job.name=x"


@pytest.mark.parametrize("name", FOLDERS)
def test_lightning_starts_the_other_ranks_in_a_folder_of_any_name(name, monkeypatch):
    hydra = OmegaConf.create({"run": {"dir": "."}, "seed": 1})
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)

    quote_for_ranks(Path("/runs", name))

    argument = f'hydra.run.dir="{hydra.run.dir}"'  # as Lightning's launcher writes it
    place = OverridesParser.create().parse_override(argument)
    assert OmegaConf.create({"seed": 1, "dir": place.value()}).dir == str(Path("/runs", name))


def test_the_command_finds_config_files_outside_the_package():
    sources = [
        {"provider": "main", "path": "/my/conf"},
        {"provider": "command-line", "path": "/own files"},
    ]
    overrides = {"hydra": ["hydra.searchpath=[/more]", "hydra/launcher=workers"]}
    hydra = make_hydra(
        overrides=overrides, runtime={"config_sources": sources}, job={"config_name": "mine"}
    )

    command = train_command("runs/a", [], hydra)

    assert command[3:] == [
        *("--config-path", "/my/conf", "--config-dir", "/own files", "--config-name", "mine"),
        *("hydra.mode=RUN", "hydra.run.dir=runs/a", "hydra.searchpath=[/more]"),
    ]
