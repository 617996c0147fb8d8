"""Prepare Ali-CCP like the usual scripts: a line, a dictionary, a line of csv.

``python tests/reference/line_by_line.py DIR OUT``

The baseline for mtnrec's preparation: the same fields, cut-off and join as its preset ``aitm``,
with the same result, without its checks.
"""

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

FIELDS = (
    *("101", "121", "122", "124", "125", "126", "127", "128", "129", "205", "206", "207", "216"),
    *("508", "509", "702", "853", "301"),
)
MIN_COUNT = 12


def features_of(text: str) -> dict[str, str]:
    """Return the last id of each field."""
    parts = re.split("[\x01\x02\x03]", text)
    return dict(zip(parts[0::3], parts[1::3], strict=False))


def join(folder: Path, split: str, out: Path, counts: dict[str, Counter[str]] | None) -> None:
    """Write the joined rows with raw ids; with ``counts``, count the ids."""
    common = {}
    with (folder / f"common_features_{split}.csv").open() as lines:
        for line in lines:
            index, _, text = line.rstrip("\n").split(",")
            features = features_of(text)
            common[index] = {field: features[field] for field in FIELDS if field in features}
    with (
        (folder / f"sample_skeleton_{split}.csv").open() as lines,
        (out / f"{split}.tmp").open("w") as joined,
    ):
        for line in lines:
            _, click, conversion, index, _, text = line.rstrip("\n").split(",")
            if (click, conversion) == ("0", "1"):
                continue
            features = features_of(text)
            features.update(common[index])
            row = [features.get(field, "0") for field in FIELDS]
            if counts is not None:
                for field in FIELDS:
                    if field in features:
                        counts[field][features[field]] += 1
            joined.write(",".join([click, conversion, *row]) + "\n")


def main() -> None:
    """Join both splits, then replace ids by indices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    join(arguments.folder, "train", arguments.out, counts)
    join(arguments.folder, "test", arguments.out, None)
    index = {}
    for field in FIELDS:
        kept = sorted(int(value) for value, count in counts[field].items() if count >= MIN_COUNT)
        index[field] = {str(value): place for place, value in enumerate(kept, start=1)}
    for split in ("train", "test"):
        path = arguments.out / f"{split}.tmp"
        with path.open() as joined, (arguments.out / f"{split}.csv").open("w") as out:
            for line in joined:
                click, conversion, *row = line.rstrip("\n").split(",")
                cells = [
                    str(index[field].get(value, 0))
                    for field, value in zip(FIELDS, row, strict=True)
                ]
                out.write(",".join([click, conversion, *cells]) + "\n")
        path.unlink()


if __name__ == "__main__":
    main()
