"""What serving systems run gives the probabilities of the checkpoint, and MTN leaves no trace."""

import dataclasses
import json
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import polars as pl
import pytest
import torch

from mtnrec import load_checkpoint
from mtnrec.batch import Bags, Batch
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.model.esmm import ESMM
from mtnrec.schema import CategoricalField, Schema
from mtnrec.serving import export as serving
from mtnrec.serving.description import describe
from mtnrec.serving.encoder import Encoder
from mtnrec.serving.scorer import Scorer

MODELS = [
    *("shared_bottom", "esmm", "mmoe", "single_task", "omoe", "ple", "adatt", "aitm", "escm2"),
    *("dcmt", "naive_cvr", "mmoe_cross", "stem"),
]
LOG = ["data=synthetic", "data.rows=2600"]


@pytest.fixture(scope="module")
def trained(train):
    """The checkpoint of a model, trained once."""
    return cache(lambda model: train(*LOG, model=model) / "checkpoints" / "best.ckpt")


def random_rows(schema, rows):
    rng = np.random.default_rng(5)
    sizes = [field.vocabulary_size for field in schema.categorical]
    return {
        "categorical": rng.integers(0, sizes, (rows, len(sizes))).astype(np.int32),
        "numerical": rng.normal(size=(rows, len(schema.numerical))).astype(np.float32),
    }


def expected_of(checkpoint, inputs):
    """The three probabilities by the network in float64, ``(rows, 3)``."""
    network = load_checkpoint(checkpoint, "cpu").network.double()
    categorical, numerical = map(torch.from_numpy, inputs.values())
    click, conversion = network(Batch(categorical, numerical.double())).positive.numpy().T
    return np.exp(np.stack([click, np.minimum(conversion - click, 0), conversion], axis=1))


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["ctr", "cvr", "ctcvr"]
    return np.stack(session.run(None, inputs), axis=1)


def run_program(path, inputs):
    model = torch.export.load(path).module()
    return np.stack([o.numpy() for o in model(*map(torch.from_numpy, inputs.values()))], axis=1)


FORMS = [("onnx", ".onnx", run_onnx), ("torch_export", ".pt2", run_program)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "form", "suffix", "run_file"),
    [(model, *form) for model, form in product([*MODELS, "heac"], FORMS)],
)
def test_the_file_gives_the_probabilities_of_the_checkpoint_whatever_the_rows(
    model, form, suffix, run_file, trained, export, tmp_path
):
    checkpoint = trained(model)
    out = tmp_path / f"model{suffix}"

    export(f"checkpoint={checkpoint}", f"format={form}", f"out={out}")

    schema = load_checkpoint(checkpoint).manifest.schema
    for rows in (1, 2, 513):
        inputs = random_rows(schema, rows)
        found = run_file(out, inputs)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected_of(checkpoint, inputs), rtol=2e-5)


def graph_of(path):
    """All of a graph but the values of its weights."""
    graph = onnx.load(path).graph
    nodes = [node.SerializeToString(deterministic=True) for node in graph.node]
    weights = [(w.name, w.data_type, tuple(w.dims)) for w in graph.initializer]
    return nodes, weights, [str(part) for part in (*graph.input, *graph.output)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["esmm", *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "esmm")]
)
def test_a_model_trained_with_mtn_exports_to_the_same_graph_of_the_same_size(
    model, train, export, tmp_path
):
    for mtn in ("true", "false"):
        run = train(*LOG, f"mtn.enabled={mtn}", "mtn.lam=0.01", model=model)
        export(f"checkpoint={run}/checkpoints/best.ckpt", f"out={tmp_path}/{mtn}.onnx")

    files = [tmp_path / f"{mtn}.onnx" for mtn in ("true", "false")]
    assert graph_of(files[0]) == graph_of(files[1])
    assert files[0].stat().st_size == files[1].stat().st_size
    assert files[0].read_bytes() != files[1].read_bytes()  # the weights differ


@pytest.mark.parametrize("bag_mode", ["mean", "sum"])
def test_padded_bags_equal_the_bags(bag_mode):
    fields = (CategoricalField("shop", 7),), (CategoricalField("brands", 9),)
    schema = Schema(fields[0], (), ("click", "buy"), funnel=True, multivalued=fields[1])
    network = ESMM(
        schema,
        embedding_dim=3,
        bag_mode=bag_mode,
        tower_widths=[5],
        dropout=0,
        batch_norm=False,
    ).eval()
    shops, none = torch.tensor([[1], [0], [6]], dtype=torch.int32), torch.empty(3, 0)
    bags = Bags(
        torch.tensor([3, 8, 5], dtype=torch.int32),
        torch.tensor([0.5, 2.0, 1.5]),
        torch.tensor([0, 2, 2, 3], dtype=torch.int32),
    )
    tokens = torch.tensor([[3, 8], [0, 0], [5, 4]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 2.0], [0.0, 0.0], [1.5, 0.0]])

    with torch.no_grad():
        expected = network(Batch(shops, none, bags=(bags,))).positive.exp()
        ctr, _, ctcvr = serving.ServedModel(network, schema)(shops, none, tokens, weights)

    torch.testing.assert_close(torch.stack([ctr, ctcvr], dim=1), expected)


@pytest.mark.slow
def test_a_quotient_of_vanishing_probabilities_is_right(trained, export, tmp_path):
    checkpoint = trained("shared_bottom")
    content = torch.load(checkpoint, weights_only=True)
    biases = [n for n, w in content["state_dict"].items() if "towers" in n and w.shape == (1,)]
    for name, logit in zip(biases, (-150, -152), strict=True):  # no float32 holds their exponential
        content["state_dict"][name] += logit
    torch.save(content, tmp_path / "rare.ckpt")
    export(f"checkpoint={tmp_path}/rare.ckpt")

    inputs = random_rows(load_checkpoint(checkpoint).manifest.schema, 200)
    click, conversion, both = run_onnx(tmp_path / "rare.onnx", inputs).T

    expected = expected_of(tmp_path / "rare.ckpt", inputs)
    assert (click == 0).all()
    assert (both == 0).all()
    np.testing.assert_allclose(conversion, expected[:, 1], rtol=1e-4)


@pytest.mark.slow
def test_a_model_with_different_probabilities_is_not_written(trained, tmp_path, monkeypatch):
    scorer = load_checkpoint(trained("esmm"), "cpu")
    right = scorer.score_batch
    monkeypatch.setattr(scorer, "score_batch", lambda batch: right(batch) * 1.001)

    with pytest.raises(RuntimeError, match=r"must give the checkpoint's probabilities, .* 1.0e-03"):
        serving.export(scorer, "onnx", tmp_path / "model.onnx")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=pickle"], "format must be one of onnx, torch_export; got 'pickle'"),
        (["out=model.pt2"], "out must be a .onnx file for format=onnx, got model.pt2"),
        (["checkpoint=none.ckpt"], "none.ckpt is missing"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides, message, trained, export):
    checkpoint = trained("esmm")

    with pytest.raises(SystemExit, match=message):
        export(*([] if "checkpoint" in overrides[0] else [f"checkpoint={checkpoint}"]), *overrides)


@pytest.mark.slow
def test_a_package_that_is_not_installed_is_named(trained, export, monkeypatch, tmp_path):
    checkpoint = trained("esmm")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(SystemExit, match=r"format=onnx needs onnxruntime.*'mtnrec\[export\]'"):
        export(f"checkpoint={checkpoint}", f"out={tmp_path}/model.onnx")


def read_metadata(path):
    if path.suffix == ".onnx":
        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["mtnrec"]
    extra = {"mtnrec.json": ""}
    torch.export.load(path, extra_files=extra)
    return extra["mtnrec.json"]


@pytest.fixture(scope="module")
def exported(shop, export, tmp_path_factory):
    """The file of a model of raw values, exported once in each format."""

    @cache
    def make(form, suffix):
        out = tmp_path_factory.mktemp("exported") / f"model{suffix}"
        export(f"checkpoint={shop[0]}", f"format={form}", f"out={out}")
        return out

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("form", "suffix"), [("onnx", ".onnx"), ("torch_export", ".pt2")])
def test_the_file_and_a_json_beside_it_describe_inputs_and_outputs(form, suffix, shop, exported):
    run, _, data = shop
    out = exported(form, suffix)
    train = pd.read_csv(data[1].removeprefix("data.train="), dtype={"brand": str, "shop": str})

    found = json.loads(read_metadata(out))

    assert json.loads(out.with_name(f"{out.name}.json").read_text()) == found
    assert [output["name"] for output in found["outputs"]] == ["ctr", "cvr", "ctcvr"]
    manifest = load_checkpoint(run).manifest
    categorical = found["inputs"]["categorical"]["columns"]
    assert [column["name"] for column in categorical] == [
        f.name for f in manifest.schema.categorical
    ]
    for column in categorical:
        counts = train[column["name"]].value_counts()
        assert set(column["vocabulary"]) == set(counts.index[counts >= 5])  # data.min_count
        assert sorted(column["vocabulary"].values()) == list(
            range(1, len(column["vocabulary"]) + 1)
        )
    numerical = found["inputs"]["numerical"]["columns"]
    assert [column["name"] for column in numerical] == list(manifest.schema.numerical)
    price = next(column for column in numerical if column["name"] == "price")
    assert price["fill"] == pytest.approx(train["price"].mean())
    assert price["scale"] != 0


def test_the_example_of_the_documentation_scores_a_raw_row(shop, exported, monkeypatch):
    run, _, _ = shop
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n(import json\n.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(exported("onnx", ".onnx").parent)
    names = {}

    exec(example, names)

    expected = load_checkpoint(run, "cpu").score(pd.DataFrame([names["row"]]))
    assert {task: score.item() for task, score in names["scores"].items()} == pytest.approx(
        expected.iloc[0].to_dict(), rel=1e-5
    )
    assert "mtnrec" not in re.sub(r'map\["mtnrec"\]', "", example)  # onnxruntime alone
    assert len(example.splitlines()) < 20


def test_a_multi_valued_field_is_described_by_its_tokens_and_weights(funnel_schema):
    field = CategoricalField("brands", 3)
    schema = dataclasses.replace(funnel_schema, multivalued=(field,))
    values = {"brands": pl.Series(["a", "b"])}
    manifest = Manifest("shop", {}, schema, {}, {}, {}, {}, {}, {})
    encoder = Encoder(schema, values, {})
    scorer = Scorer(torch.nn.Identity(), manifest, encoder, torch.device("cpu"))

    inputs = describe(scorer)["inputs"]

    assert list(inputs) == ["categorical", "numerical", "brands_tokens", "brands_weights"]
    assert inputs["brands_tokens"]["vocabulary"] == {"a": 1, "b": 2}
    assert inputs["brands_weights"]["column"] == "brands_weights"
    assert inputs["categorical"]["columns"][0]["vocabulary"] is None  # raw values are indices
    assert inputs["numerical"]["columns"][0] == {
        **{"name": "price", "fill": None, "shift": 0.0, "scale": 1.0}
    }
