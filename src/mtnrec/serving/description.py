"""Description of an exported model: from raw values by column to its inputs, and its outputs."""

from typing import Any

from mtnrec.schema import CategoricalField
from mtnrec.serving.scorer import Scorer

FORMAT_VERSION = 1
NAME = "mtnrec"  # key of the metadata in an ONNX file
FILE = "mtnrec.json"  # name of the extra file in a torch.export file


def describe(scorer: Scorer) -> dict[str, Any]:
    """Return a description of a model, as plain values for JSON.

    ::

        inputs.categorical.columns[i]   name, vocabulary: column i holds the index of the value's
                                        text in the vocabulary, 0 for a missing or unseen value
        inputs.numerical.columns[i]     name, fill, shift, scale: column i holds
                                        (value - shift) / scale; fill replaces a missing value,
                                        which must not occur if fill is null
        inputs.<field>_tokens           column, vocabulary: the values' indices, padded with 0
        inputs.<field>_weights          column: weights of the values, padded with 0
        outputs[i]                      name, definition: the probability of a task

    A ``vocabulary`` is null if the data set has none: its values are indices. Texts are written
    as in a csv file; an integer is its digits.
    """
    schema = scorer.manifest.schema
    transforms = scorer.manifest.transforms
    inputs: dict[str, Any] = {
        "categorical": {
            "type": "int32",
            "shape": ["rows", len(schema.categorical)],
            "columns": [
                {"name": field.name, "vocabulary": _vocabulary(scorer, field)}
                for field in schema.categorical
            ],
        },
        "numerical": {
            "type": "float32",
            "shape": ["rows", len(schema.numerical)],
            "columns": [
                {"name": name, "fill": None, "shift": 0.0, "scale": 1.0, **transforms.get(name, {})}
                for name in schema.numerical
            ],
        },
    }
    for field in schema.multivalued:
        shape = ["rows", f"tokens of {field.name}"]
        inputs[f"{field.name}_tokens"] = {
            "type": "int32",
            "shape": shape,
            "column": field.name,
            "vocabulary": _vocabulary(scorer, field),
        }
        inputs[f"{field.name}_weights"] = {
            "type": "float32",
            "shape": shape,
            "column": f"{field.name}_weights",
        }
    return {
        "format_version": FORMAT_VERSION,
        "data": scorer.manifest.source,
        "inputs": inputs,
        "outputs": [
            {"name": task.name, "type": "float32", "definition": schema.definition(task)}
            for task in schema.tasks
        ],
    }


def _vocabulary(scorer: Scorer, field: CategoricalField) -> dict[str, int] | None:
    """Return the index of each value's text."""
    values = scorer.encoder.values(field.name)
    return None if values is None else {str(v): i for i, v in enumerate(values, start=1)}
