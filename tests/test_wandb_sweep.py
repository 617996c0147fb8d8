from pathlib import Path

import pytest
import yaml

from mtnrec.config import CONF_DIR

SWEEP = yaml.safe_load((Path(__file__).resolve().parents[1] / "sweep.yaml").read_text())
VALUES = [(key, value) for key, entry in SWEEP["parameters"].items() for value in entry["values"]]


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_every_value_is_an_override_of_the_training(key, value, compose_config):
    # As the agent writes them: ${args_no_hyphens} is KEY=VALUE.
    config = compose_config(f"{key}={value}", "logger=wandb")

    if key == "model":
        assert config.model._target_.startswith(f"mtnrec.model.{value}.")
    else:
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == {"true": True, "false": False}.get(value, value)


def test_the_sweep_looks_for_the_monitored_metric_and_stops_no_run(compose_config):
    assert SWEEP["metric"] == {"name": compose_config().monitor, "goal": "maximize"}
    assert "early_terminate" not in SWEEP
    assert SWEEP["command"][1:5] == ["python", "-m", "${program}", "${args_no_hyphens}"]
    assert (CONF_DIR / "logger" / "wandb.yaml").is_file()
