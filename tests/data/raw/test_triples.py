"""Ali-CCP's lines against splitting strings, on any list and on real bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnrec.data.raw.triples import MISSING, Selection, parse_lines

FIELDS = ("101", "109_14", "127", "127_14", "205", "210", "853")
REAL = (
    Path(__file__).parents[4]
    / "shared"
    / "data"
    / "aliccp_raw_fragments"
    / "common_features_train.first2rows.csv"
)


def values():
    """Texts as in the files: 1.0, or up to 5 decimals."""
    decimals = st.integers(0, 5).flatmap(
        lambda n: st.integers(0, 10 ** (n + 2)).map(lambda m: f"{m / 10**n:.{n}f}")
    )
    return st.one_of(st.just("1.0"), decimals, st.integers(-9, 99).map(str))


def runs():
    """Runs of triples in any order; a field may have several."""
    field = st.sampled_from([*FIELDS, "1", "99999999", "a_longer_name"])
    run = st.tuples(field, st.lists(st.tuples(st.integers(0, 2**31 - 1), values()), max_size=5))
    return st.lists(run, max_size=8)


def rows():
    return st.lists(st.tuples(st.integers(0, 2**64 - 1), st.booleans(), runs()), max_size=6)


def line_of(number, index, click, runs, *, skeleton):
    triples = [f"{field}\x02{i}\x03{v}" for field, run in runs for i, v in run]
    head = f"{number},{click:d},0," if skeleton else ""
    return f"{head}{index:016x},{len(triples)}," + "\x01".join(triples) + "\n"


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    rows=rows(),
    ids=st.lists(st.sampled_from(FIELDS), unique=True),
    bags=st.lists(st.sampled_from(FIELDS), unique=True),
    first=st.sets(st.sampled_from(FIELDS)),
    skeleton=st.booleans(),
)
def test_runs_in_any_order_give_the_triples_of_each_field(rows, ids, bags, first, skeleton):
    block = "".join(line_of(n, *row, skeleton=skeleton) for n, row in enumerate(rows)).encode()

    selection = Selection(ids=ids, values=ids[:2], bags=bags, first=first)
    lines = parse_lines(block, selection, skeleton=skeleton)

    assert not lines.error.any()
    assert lines.index.tolist() == [index for index, _, _ in rows]
    if skeleton:
        assert lines.labels.tolist() == [[click, 0] for _, click, _ in rows]
    tokens = {
        field: iter(zip(*found[1:], strict=True))
        for field, found in zip(bags, lines.bags, strict=True)
    }
    for row, (_, _, runs) in enumerate(rows):
        triples = [(field, i, float(v)) for field, run in runs for i, v in run]
        for column, field in enumerate(ids):
            of_field = [(i, v) for name, i, v in triples if name == field]
            place = 0 if field in first else -1
            assert lines.ids[row, column] == (of_field[place][0] if of_field else MISSING)
            if column < 2:
                expected = of_field[place][1] if of_field else np.nan
                assert lines.values[row, column] == expected or not of_field
                assert np.isnan(lines.values[row, column]) == (not of_field)
        for field, (lengths, _, _) in zip(bags, lines.bags, strict=True):
            of_field = [(i, v) for name, i, v in triples if name == field]
            assert lengths[row] == len(of_field)
            for i, v in of_field:
                assert next(tokens[field]) == (i, np.float32(v))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    rows=rows().filter(len),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    skeleton=st.booleans(),
)
def test_no_byte_hides_or_harms_the_other_lines(rows, place, byte, skeleton):
    texts = [line_of(n, *row, skeleton=skeleton).encode() for n, row in enumerate(rows)]
    victim = int(place * len(texts))
    at = int((place * len(texts) - victim) * (len(texts[victim]) - 1))
    if byte == 10:
        byte = 11
    texts[victim] = texts[victim][:at] + bytes([byte]) + texts[victim][at + 1 :]
    selection = Selection(ids=["101", "205"], values=["853"], bags=["127_14", "210"])

    together = parse_lines(b"".join(texts), selection, skeleton=skeleton)

    assert len(together.error) == len(rows)
    for row, text in enumerate(texts):
        alone = parse_lines(text, selection, skeleton=skeleton)
        assert together.error[row] == alone.error[0]
        assert row == victim or alone.error[0] == 0
        if alone.error[0] == 0:
            assert together.ids[row].tolist() == alone.ids[0].tolist()
            assert [b[0][row] for b in together.bags] == [b[0][0] for b in alone.bags]


@settings(max_examples=120, deadline=None)
@given(text=st.text("0123456789.-+eE naif", max_size=20))
def test_a_value_is_read_as_python_reads_it_or_refused(text):
    line = f"{7:016x},1,205\x021\x03{text}\n".encode()

    lines = parse_lines(line, Selection(values=["205"]), skeleton=False)

    if lines.error[0]:
        plain = text.removeprefix("-").replace(".", "", 1)
        assert not plain.isdigit() or len(plain) > 15
    else:
        assert lines.values[0, 0] == float(text)


@pytest.mark.skipif(not REAL.is_file(), reason="the real sample is not beside this checkout")
def test_the_real_bytes_hold_343_and_811_triples():
    data = REAL.read_bytes().rstrip(b"\n") + b"\n"
    selection = Selection(
        ids=["101", "121", "122", "124", "125", "126", "127", "128", "129"],
        bags=["109_14", "110_14", "127_14", "150_14"],
    )

    lines = parse_lines(data, selection, skeleton=False)

    assert not lines.error.any()
    found = (lines.ids != MISSING).sum(axis=1) + sum(lengths for lengths, _, _ in lines.bags)
    assert found.tolist() == [343, 811]
    for row, text in enumerate(data.decode().splitlines()):
        index, number, triples = text.split(",")
        assert int(index, 16) == lines.index[row]
        assert int(number) == len(triples.split("\x01"))
        for column, field in enumerate(selection.ids):
            ids = [
                t.split("\x02")[1].split("\x03")[0]
                for t in triples.split("\x01")
                if t.startswith(f"{field}\x02")
            ]
            assert [lines.ids[row, column]] == [int(i) for i in ids]
