"""Checkpoints on the disk: whole, refused where they are not what they should be."""

import errno
import io
import os
import pickle
import re
import resource
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnrec.checkpoint.io import AtomicCheckpointIO, check_weights, read_checkpoint
from mtnrec.checks import InputError
from mtnrec.system.files import remove_leftovers

CONTENT = {"state_dict": {"a": torch.arange(5000.0)}, "callbacks": {}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def test_nothing_but_the_checkpoint_is_left(path):
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(read_checkpoint(path, "")["state_dict"]["a"], CONTENT["state_dict"]["a"])


def test_a_checkpoint_gets_its_name_only_when_it_is_on_the_disk(path, monkeypatch):
    before, seen = path.read_bytes(), []

    def look(descriptor):
        (temporary,) = set(path.parent.iterdir()) - {path}
        seen.append((path.read_bytes() == before, temporary.stat().st_size > 0))

    monkeypatch.setattr(os, "fsync", look)
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"more": 1}, path)

    assert seen == [(True, True)]
    assert read_checkpoint(path, "")["more"] == 1


def test_a_full_disk_keeps_the_last_checkpoint(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the system refuses to write more
    try:
        with pytest.raises(InputError, match=r"last.ckpt could not be written \(File too large; "):
            AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_disk_is_reported_with_a_remedy(path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(
        InputError, match=r"No space left on device; .*Delete other files, or choose"
    ):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)


def test_leftovers_are_those_of_the_file_alone(path):
    others = [path.with_name(name) for name in ("best.ckpt", ".best.ckpt.1.tmp", "last.ckpt.tmp")]
    for other in others:
        other.touch()
    path.with_name(".last.ckpt.4711.tmp").touch()

    remove_leftovers(path)

    assert set(path.parent.iterdir()) == {path, *others}


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_truncated_file_is_refused(share, path):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    with pytest.raises(InputError, match=r"last.ckpt is damaged or not a checkpoint \(.*Delete it"):
        read_checkpoint(path, "Delete it.")


def test_each_flipped_bit_is_found(path):
    content = path.read_bytes()
    # Anywhere: in the weights, the pickle, the archive's tables and the checksum.
    for place in [*range(0, len(content), 101), *range(len(content) - 110, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)

        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(path, "Delete it.")


def test_a_checkpoint_without_a_checksum_is_read_with_one_warning(path, caplog, monkeypatch):
    torch.save(CONTENT, path)
    monkeypatch.chdir(path.parent)

    for spelling in (path, path, path.relative_to(path.parent)):
        found = read_checkpoint(spelling, "")

    assert torch.equal(found["state_dict"]["a"], CONTENT["state_dict"]["a"])
    (warning,) = caplog.messages
    assert warning.endswith(
        "has no checksum, since an earlier version wrote it; damage may go unnoticed"
    )


def test_torch_reads_a_checkpoint_with_a_checksum(path):
    for mmap in (False, True):
        content = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(content["state_dict"]["a"], CONTENT["state_dict"]["a"])


def test_all_that_training_saves_is_read_back(path):
    shared = torch.arange(6, dtype=torch.bfloat16)
    state = {
        "numbers": [1, -1, 2**40, 0.5, True, None, "é", b"\x00\xff", b""],
        "containers": ((), {1, 2}, Counter("aab"), {"a": {"b": [(1, 2)]}}),
        "tensors": [shared, shared[2:4], shared.view(2, 3).T, torch.tensor(3), torch.empty(0, 2)],
        "types": [torch.float32, torch.device("cpu"), torch.Size([2, 3])],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bools": torch.tensor([True, False]),
    }
    weights = torch.nn.BatchNorm1d(2).state_dict()
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "callbacks": state}, path)

    content = read_checkpoint(path, "")

    found = content["callbacks"]
    for key in ("numbers", "containers", "types"):
        assert found[key] == state[key]
    for one, other in zip(found["tensors"], state["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    found["tensors"][0][2] = 7
    assert found["tensors"][1][0] == 7  # the storage is still shared
    assert torch.equal(found["parameter"], torch.ones(2))
    assert torch.equal(found["bools"], state["bools"])
    assert content["state_dict"]._metadata == weights._metadata


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_file_is_not_run(path, tmp_path):
    torch.save(Harmful(), path)

    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        read_checkpoint(path, "Delete it.")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"weights": torch.zeros(3)}, [1, 2]])
def test_a_foreign_file_is_refused(content, path):
    torch.save(content, path)

    with pytest.raises(InputError, match=r"is not a training checkpoint\. Delete it"):
        read_checkpoint(path, "Delete it.")


@pytest.mark.parametrize(
    "weight",
    [3, None, [torch.zeros(2)], torch.zeros(1).expand(10**12), torch.eye(2).to_sparse()],
)
def test_incomplete_weights_are_refused(weight, path):
    torch.save(CONTENT | {"state_dict": {"a": weight}}, path)

    with pytest.raises(InputError, match=r"last.ckpt is damaged.*\. Delete it"):
        read_checkpoint(path, "Delete it.")


def test_an_expanded_tensor_is_refused_anywhere(path):
    state = [torch.zeros(1).expand(10**12)]
    state.append(state)  # in itself
    torch.save(CONTENT | {"optimizer_states": [{"state": {0: state}}]}, path)

    with pytest.raises(InputError, match=r"a tensor \(1000000000000,\) is incomplete"):
        read_checkpoint(path, "Delete it.")


def repack(path, change, compression=zipfile.ZIP_STORED):
    """Write a checkpoint anew, with right checksums of its parts and none of the whole."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, part in change(parts).items():
            archive.writestr(name, part)


def test_a_checkpoint_that_inflates_is_refused_unread(path):
    repack(path, lambda parts: parts | {"last/data/1": bytes(10**7)}, zipfile.ZIP_DEFLATED)

    with pytest.raises(InputError, match="its parts are compressed"):
        read_checkpoint(path, "Delete it.")


def test_parts_that_share_their_bytes_are_refused(path):
    torch.save(CONTENT, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        most = max(info.file_size for info in archive.infolist())
    for at in [m.start() for m in re.finditer(b"PK\x01\x02", content)]:
        content[at + 20 : at + 28] = 2 * most.to_bytes(4, "little")  # sizes: all the largest
    path.write_bytes(content)

    with pytest.raises(InputError, match="its parts are larger than the file"):
        read_checkpoint(path, "Delete it.")


def with_pickle(path, pickled):
    """Replace the pickle of a checkpoint."""
    torch.save(CONTENT, path)
    repack(path, lambda parts: {n: pickled if "pkl" in n else p for n, p in parts.items()})


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self._reduced = (function, arguments, state)

    def __reduce__(self):
        return self._reduced


def laughs():
    content = [0]
    for _ in range(40):
        content = [content, content]
    return content


def nested(depth):
    content = []
    for _ in range(depth):
        content = [content]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Call(bytearray, 6 * 10**9), "must not hold __builtin__.bytearray"),
        (Call(bytes, 6 * 10**9), "damaged"),
        (Call(torch.FloatStorage, 6 * 10**9), "must not hold|damaged"),
        (Call(torch.Tensor, 6 * 10**9), "must not hold torch"),
        (Call(torch.empty, 6 * 10**9), "must not hold"),
        (Call(OrderedDict, state={"items": 1}), "is not a training checkpoint"),
        (Call(torch._utils._rebuild_tensor_v2, 1, 0, (9,), (1,), False, None), "has no storage"),
        (laughs(), "nested too deeply, or repeat"),
        (nested(100), "nested too deeply"),
    ],
)
def test_a_pickle_that_asks_for_memory_or_calls_is_refused(content, message, path):
    with_pickle(path, pickle.dumps(content, protocol=2))

    with pytest.raises(InputError, match=message):
        read_checkpoint(path, "Delete it.")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a place in the memory
        b"\x80\x05\x96\x00\x00\x00\x80\x01\x00\x00\x00.",  # a bytearray of 6 GB
        b"\x80\x02X\x00\x00\x00\x7f.",  # a text
        b"\x80\x02" + b"]" * (1 << 24) + b".",
    ],
)
def test_a_pickle_cannot_ask_for_more_than_its_bytes(pickled, path):
    with_pickle(path, pickled)

    with pytest.raises(InputError, match="damaged"):
        read_checkpoint(path, "Delete it.")


def test_archives_that_readers_understand_differently_are_refused(path):
    torch.save(CONTENT, path)
    (second := path.with_name("second")).write_bytes(b"")
    torch.save({"other": 1}, second)
    joined = path.read_bytes()[:-2] + len(second.read_bytes()).to_bytes(2, "little")

    path.write_bytes(joined + second.read_bytes())  # an archive in the comment of another
    with pytest.raises(InputError, match=r"damaged|is not a training checkpoint"):
        read_checkpoint(path, "Delete it.")

    torch.save(CONTENT, path)
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("else/data.pkl", pickle.dumps({}, protocol=2))
    path.write_bytes(content.getvalue())
    with pytest.raises(InputError, match="two of its parts have one name"):
        read_checkpoint(path, "Delete it.")


@pytest.mark.parametrize("size", [b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"])
def test_a_pickle_whose_size_differs_from_its_bytes_is_refused(size, path):
    pickled = b"M" + (5000).to_bytes(2, "little")

    def change(parts):
        name = next(name for name in parts if name.endswith("data.pkl"))
        assert pickled in parts[name]
        return parts | {name: parts[name].replace(pickled, size)}

    repack(path, change)

    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        read_checkpoint(path, "Delete it.")


@settings(max_examples=100, deadline=None)
@given(at=st.floats(0, 1), put=st.binary(min_size=1, max_size=6), in_pickle=st.booleans())
def test_no_bytes_lead_to_another_error(at, put, in_pickle, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    torch.save(CONTENT, path)

    def damage(content):
        start = int(at * len(content))
        return content[:start] + put + content[start + len(put) :]

    if in_pickle:
        repack(path, lambda parts: {n: damage(p) if "pkl" in n else p for n, p in parts.items()})
    else:
        path.write_bytes(damage(path.read_bytes()))

    try:
        weight = read_checkpoint(path, "Delete it.")["state_dict"]
    except InputError:
        return
    assert all(isinstance(w, torch.Tensor) for w in weight.values())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "a is (2, 3) there and (3, 2) here. Delete it"),
        ({}, "a is absent there and (3, 2) here"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(1)}, "b is (1,) there and absent here"),
    ],
)
def test_weights_of_another_model_are_refused(found, message, path):
    expected = {"a": torch.zeros(3, 2)}

    with pytest.raises(InputError, match="is of another model or schema: " + re.escape(message)):
        check_weights(path, found, expected, "Delete it.")
    check_weights(path, expected, expected, "Delete it.")
