import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from mtnrec.command.config import CONF_DIR
from mtnrec.sweep.composition import Composer

RUNS = [
    ["model=esmm", "seed=0", "mtn.enabled=true", "mtn.lam=1e-3"],
    ["model=esmm", "seed=1", "mtn.enabled=true", "data.name='a,b'"],
    ["seed=2", "model=mmoe", "model.experts=4", "model.tower_widths=[8,4]"],
    [
        "+trainer.limit_train_batches=3",
        "++trainer.max_epochs=1",
        "~trainer.enable_model_summary",
        "model=esmm",
    ],
    ["model=esmm", "callbacks=[learning_rate]", "noise.label_flip={conversion:0.1}"],
    ["callbacks={a:{_target_:x.Y}}", "model=esmm", "output_dir='a=b'"],
    ["model=esmm", "data_root=${oc.env:HOME}", "hydra.job.name=${seed}", "hydra/launcher=workers"],
    ["experiment=denoising", "model.experts=2", "monitor=val/ctr_auc", "seed=3"],
    ["model=esmm", "logger=[csv,wandb]", "stop=patience"],
]


@pytest.fixture
def loader():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def compose_sweep(loader, *overrides):
    return loader.load_configuration("train", list(overrides), RunMode.MULTIRUN)


def compose_and_report(config, loader, override):
    composer = Composer(config, loader)
    composer.compose([override])
    composer.report()  # raises the error of a key that no run has


@pytest.mark.slow
def test_runs_are_composed_as_by_hydra(loader):
    config = compose_sweep(loader, "hydra.sweep.dir=runs", "model=mmoe")
    composer = Composer(config, loader)

    expectations = [loader.load_sweep_config(config, overrides) for overrides in RUNS]
    pairs = list(zip(RUNS, expectations, strict=True))
    for overrides, expected in [*pairs, *reversed(pairs)]:  # each also after its likes
        composed, fitting = composer.compose(overrides)
        assert list(composed.hydra.overrides.task) == list(expected.hydra.overrides.task)
        assert composed.hydra.job.override_dirname == expected.hydra.job.override_dirname
        assert fitting == overrides
        plain = OmegaConf.to_container(composed, resolve=False)
        assert plain == OmegaConf.to_container(expected, resolve=False)


@pytest.mark.parametrize("override", ["trainr.max_epochs=2", "model=no", "seed=x", "+seed=1"])
def test_what_hydra_refuses_is_refused_with_its_error(loader, override):
    config = compose_sweep(loader)
    with pytest.raises(HydraException) as expected:
        loader.load_sweep_config(config, [override])

    with pytest.raises(type(expected.value)) as found:
        compose_and_report(config, loader, override)

    assert str(found.value) == str(expected.value)
