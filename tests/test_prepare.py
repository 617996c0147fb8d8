import pytest

from mtnrec.data.ali_ccp import AliCcp


def test_a_preparation_reports_rows_and_positives(prepare, write_aliexpress, tmp_path, capsys):
    folder = tmp_path / ("long" * 30)
    raw_dir = write_aliexpress(tmp_path / "raw")

    prepare("data=aliexpress_nl", f"data.raw_dir={raw_dir}", f"data.dir={folder}")

    output = capsys.readouterr().out
    assert f"aliexpress_nl is prepared in {folder}\n" in output
    for split in ("train", "test"):
        assert f"{split}: 60 rows; click 20 (33.333%), conversion 10 (16.667%)" in output
    assert (folder / "schema.json").is_file()


def test_a_preparation_without_raw_files_names_the_needed_ones(prepare, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: data\.raw_dir is not given\. .*tianchi"):
        prepare("data=aliexpress_nl")

    assert list(tmp_path.iterdir()) == []


def test_a_preparation_leaves_nothing_behind_when_a_file_is_malformed(
    prepare, write_aliexpress, tmp_path
):
    raw_dir = write_aliexpress(tmp_path / "raw")
    with (raw_dir / "test.csv").open("a") as file:
        file.write("1,2,3\n")

    with pytest.raises(SystemExit, match=r"^mtnrec: .*test\.csv"):
        prepare("data=aliexpress_nl", f"data.raw_dir={raw_dir}")

    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_an_interrupted_command_ends_without_a_traceback(prepare, monkeypatch, capsys, tmp_path):
    def interrupt(datamodule):
        raise KeyboardInterrupt

    monkeypatch.setattr(AliCcp, "prepare", interrupt)

    with pytest.raises(SystemExit) as error:
        prepare("data=ali_ccp", f"data.raw_dir={tmp_path}")

    assert error.value.code == 130
    assert capsys.readouterr().err == "mtnrec: interrupted\n"
