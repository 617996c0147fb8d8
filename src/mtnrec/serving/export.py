"""Export of a trained model for serving systems: ONNX, or a program of torch.export."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim

from mtnrec.batch import Bags, Batch
from mtnrec.checks import InputError
from mtnrec.metric.task_metrics import task_probabilities
from mtnrec.schema import Schema
from mtnrec.serving import description
from mtnrec.serving.scorer import Scorer
from mtnrec.system.files import writable, write_atomic

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
_TOLERANCE = 1e-4  # relative, of a probability; float32 logarithms of rare ones lose digits
_SMALLEST = 1e-6  # probability below which differences are absolute
_BATCHES = (1, 2, 77, 1000)  # rows
_LARGEST = 2**31 - 1  # size of a dimension; torch 2.7 rejects unbounded ones

Run = Callable[[dict[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]]


class ServedModel(nn.Module):
    """A checkpoint's network that maps arrays to probabilities.

    Args:
        network: Network in evaluation mode.
        schema: The fields and tasks.
    """

    def __init__(self, network: nn.Module, schema: Schema) -> None:
        super().__init__()
        self.network = network
        self._schema = schema

    def forward(self, categorical: Tensor, numerical: Tensor, *bags: Tensor) -> tuple[Tensor, ...]:
        """Return the probability of each task, ``(B,)`` each.

        Args:
            categorical: Vocabulary indices, int32 ``(B, F)``.
            numerical: float32 ``(B, N)``, transformed as the training data was.
            bags: For each multi-valued field in turn, its tokens, int32 ``(B, K)``, and their
                weights, float32 ``(B, K)``, which are 0 where a row has fewer than ``K`` tokens.
        """
        output = self.network(_to_batch(categorical, numerical, *bags))
        return tuple(task_probabilities(self._schema, output.positive))


class Exported(NamedTuple):
    """Summary of an exported file.

    Args:
        inputs: Types and shapes of the inputs, by name.
        outputs: Names of the outputs.
        size: Size of the file in bytes.
        difference: Largest relative difference of a probability from the checkpoint's.
        rows: Random rows on which the two were compared.
        description: The JSON file beside it.
    """

    inputs: dict[str, str]
    outputs: list[str]
    size: int
    difference: float
    rows: int
    description: Path


def export(scorer: Scorer, form: str, out: Path) -> Exported:
    """Write a model after comparing it with the checkpoint on random batches of several sizes.

    What :func:`~mtnrec.serving.description.describe` says is in its metadata, and in a JSON file
    beside it, ``<out>.json``.

    Args:
        scorer: The model, on the CPU.
        form: ``onnx`` or ``torch_export``.
        out: File, written atomically.

    Raises:
        InputError: If a package that the format needs is not installed, or a file cannot be
            written.
        RuntimeError: If the exported model gives different probabilities.
    """
    schema = scorer.manifest.schema
    generator = np.random.default_rng(0)
    example = _random_inputs(schema, 3, generator)
    model = ServedModel(scorer.network, schema).eval()
    tensors = tuple(torch.from_numpy(array) for array in example.values())
    shapes = _dynamic_shapes(schema)
    described = json.dumps(description.describe(scorer), ensure_ascii=False)
    try:
        if form == "onnx":
            content = _as_onnx(model, tensors, shapes, list(example), scorer.tasks, described)
        else:
            content = _as_program(model, tensors, shapes, described)
        run = (_runner_of_onnx if form == "onnx" else _runner_of_program)(content)
    except ImportError as error:
        raise InputError(
            f"format={form} needs {error.name}, which is not installed. Install it with pip "
            "install 'mtnrec[export]'."
        ) from error
    difference, rows = 0.0, 0
    for inputs in (_random_inputs(schema, size, generator) for size in _BATCHES):
        batch = _to_batch(*map(torch.from_numpy, inputs.values()))
        expected = scorer.score_batch(batch).double().numpy()
        found = np.stack(run(inputs), axis=1).astype(np.float64)
        relative = np.abs(found - expected) / np.maximum(expected, _SMALLEST)
        difference = max(difference, float(relative.max()))
        rows += len(expected)
    if not difference < _TOLERANCE:
        raise RuntimeError(
            f"the {form} file must give the checkpoint's probabilities, got a relative difference "
            f"of {difference:.1e} on random rows. Nothing was written."
        )
    beside = out.with_name(f"{out.name}.json")
    with writable(out):
        write_atomic(beside, described + "\n")
        write_atomic(out, content)
    return Exported(_shapes(schema), scorer.tasks, len(content), difference, rows, beside)


def _shapes(schema: Schema) -> dict[str, str]:
    """Return types and shapes of the inputs, by name."""
    shapes = {
        "categorical": f"int32 (rows, {len(schema.categorical)})",
        "numerical": f"float32 (rows, {len(schema.numerical)})",
    }
    for field in schema.multivalued:
        shapes[f"{field.name}_tokens"] = f"int32 (rows, tokens of {field.name})"
        shapes[f"{field.name}_weights"] = f"float32 (rows, tokens of {field.name})"
    return shapes


def _dynamic_shapes(schema: Schema) -> tuple[Any, ...]:
    rows = Dim("rows", min=1, max=_LARGEST)
    bags: list[dict[int, Any]] = []
    for number in range(len(schema.multivalued)):
        padded = {0: rows, 1: Dim(f"tokens_{number}", min=1, max=_LARGEST)}
        bags += [padded, padded]
    return {0: rows}, {0: rows}, *([tuple(bags)] if bags else [])


def _random_inputs(
    schema: Schema, rows: int, generator: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    sizes = [field.vocabulary_size for field in schema.categorical]
    inputs: dict[str, npt.NDArray[Any]] = {
        "categorical": generator.integers(0, sizes, (rows, len(sizes)), dtype=np.int32),
        "numerical": generator.random((rows, len(schema.numerical)), dtype=np.float32),
    }
    for field in schema.multivalued:
        shape = rows, int(generator.integers(2, 6))
        tokens = generator.integers(0, field.vocabulary_size, shape, dtype=np.int32)
        weights = generator.random(shape, dtype=np.float32)
        weights[np.arange(shape[1]) >= generator.integers(0, shape[1] + 1, (rows, 1))] = 0
        inputs |= {f"{field.name}_tokens": tokens, f"{field.name}_weights": weights}
    return inputs


def _to_batch(categorical: Tensor, numerical: Tensor, *bags: Tensor) -> Batch:
    """Make a batch from an exported model's inputs."""
    none = categorical.new_empty(0)
    fields = zip(bags[::2], bags[1::2], strict=True)
    return Batch(categorical, numerical, bags=tuple(Bags(*parts, none) for parts in fields))


def _as_program(
    model: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...], described: str
) -> bytes:
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={description.FILE: described})
    return file.getvalue()


def _as_onnx(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: tuple[Any, ...],
    names: list[str],
    tasks: list[str],
    described: str,
) -> bytes:
    with warnings.catch_warnings():
        # Warnings about torch's own exporter, and about its duplicate dimension names.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
        warnings.filterwarnings("ignore", message=".*# The axis name")
        program = torch.onnx.export(
            model,
            inputs,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=tasks,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # None only if written to a file
    model_proto = program.model_proto
    model_proto.metadata_props.add(key=description.NAME, value=described)
    content: bytes = model_proto.SerializeToString()
    return content


def _runner_of_onnx(content: bytes) -> Run:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _runner_of_program(content: bytes) -> Run:
    model = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: [
        output.numpy() for output in model(*map(torch.from_numpy, inputs.values()))
    ]
