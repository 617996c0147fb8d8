import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_made_from_the_sdist_trains_without_the_checkout(tmp_path):
    dist, site, elsewhere = (tmp_path / name for name in ("dist", "site", "elsewhere"))
    elsewhere.mkdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=elsewhere)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", site, wheel, cwd=elsewhere)

    where = "import mtnrec; print(mtnrec.__file__)"
    found = run(sys.executable, "-c", where, cwd=elsewhere, PYTHONPATH=str(site))
    tiny = ["data.rows=1000", "model.embedding_dim=2", "model.tower_widths=[4]"]
    quick = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "hydra.sweep.dir=runs"]
    command = (sys.executable, "-m", "mtnrec.train", "-m", *tiny, *quick)
    run(*command, cwd=elsewhere, PYTHONPATH=str(site))

    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/conf/model/esmm.yaml") for name in archive.getnames())
    assert found.strip() == str(site / "mtnrec" / "__init__.py")
    (entries,) = site.glob("mtnrec-*.dist-info/entry_points.txt")
    for name in ("describe", "prepare", "status", "train"):
        assert (site / "mtnrec" / "conf" / f"{name}.yaml").is_file()
        assert f"mtnrec-{name} = mtnrec.{name}:main\n" in f"{entries.read_text()}\n"
    (path,) = (elsewhere / "runs").glob("*/result.json")
    record = json.loads(path.read_text())
    assert record["status"] == "finished"
    assert record["data"]["rows"]["test"] == 200


def test_a_console_script_finds_the_config_from_any_folder(tmp_path):
    script = Path(sys.executable).with_name("mtnrec-prepare")

    config = run(script, "--cfg", "job", "data=synthetic", cwd=tmp_path)

    assert "_target_: mtnrec.data.synthetic.Synthetic" in config
    assert "data_root: ${oc.env:MTNREC_DATA,data}" in config
    assert list(tmp_path.iterdir()) == []
