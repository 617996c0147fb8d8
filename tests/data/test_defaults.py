"""The defaults of the constructors are those of the YAML files."""

import dataclasses
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from mtnrec.command.config import CONF_DIR
from mtnrec.data.ali_ccp import AliCcp
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.census_income import CensusIncome
from mtnrec.data.kuairand import KuaiRand
from mtnrec.data.noise import Noise
from mtnrec.data.synthetic import Synthetic
from mtnrec.data.table import Table


def load(path):
    """A group file with its ``loading`` base."""
    config = OmegaConf.load(path)
    bases = [name for name in config.pop("defaults", []) if name != "_self_"]
    names = [name.removesuffix("@_here_") for name in bases]
    return OmegaConf.merge(*(load(path.parent / f"{name}.yaml") for name in names), config)


FILES = {
    path.stem: load(path)
    for folder in ("data", "noise")
    for path in sorted(Path(CONF_DIR, folder).rglob("*.yaml"))
    if "_target_" in OmegaConf.load(path)
}


def default(parameter):
    if parameter.default_factory is not dataclasses.MISSING:
        return parameter.default_factory()
    return parameter.default


def test_each_constructor_has_a_file():
    targets = {get_class(config["_target_"]) for config in FILES.values()}

    assert targets == {AliCcp, AliExpress, CensusIncome, KuaiRand, Noise, Synthetic, Table}


@pytest.mark.parametrize("name", FILES)
def test_constants_in_yaml_are_the_defaults_of_the_signature(name):
    config = FILES[name]
    fields = {field.name: field for field in dataclasses.fields(get_class(config["_target_"]))}
    constants = {
        key: OmegaConf.to_container(config)[key]
        for key in config
        if key != "_target_"
        and not OmegaConf.is_interpolation(config, key)
        and not OmegaConf.is_missing(config, key)
    }

    order = set() if name == "feature_replacement" else {"seed"}  # a run sets it
    assert fields.keys() - order == config.keys() - {"_target_"}
    assert {key: default(fields[key]) for key in constants} == constants
    assert len(constants) >= len(fields) - 6


@pytest.mark.parametrize("name", FILES)
def test_seeds_are_zero_by_default(name):
    fields = dataclasses.fields(get_class(FILES[name]["_target_"]))

    seeds = {field.name: field.default for field in fields if field.name.endswith("seed")}

    assert seeds
    assert set(seeds.values()) == {0}


@pytest.mark.parametrize("root", ["elsewhere", None])
@pytest.mark.parametrize(
    ("choice", "make"),
    [
        ("ali_ccp", AliCcp),
        ("aliexpress_nl", lambda: AliExpress(country="nl")),
        ("census_income", CensusIncome),
        ("kuairand", KuaiRand),
        ("synthetic", Synthetic),
        ("table", Table),
    ],
)
def test_name_and_folder_are_those_of_the_command_line(
    choice, make, root, compose_config, monkeypatch
):
    if root is None:
        monkeypatch.delenv("MTNREC_DATA")
    else:
        monkeypatch.setenv("MTNREC_DATA", root)

    made, composed = make(), instantiate(compose_config(f"data={choice}").data, _convert_="all")

    assert made.dir == composed.dir == made.folder
    assert made.dir.parent == Path(root or "data")
    assert made.name == composed.name == choice
