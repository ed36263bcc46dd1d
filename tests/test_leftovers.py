"""What killed saves leave: cleaned by the next one, a hidden model is put back, and a save that runs is left alone."""

import errno
import logging
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_lrq.checkpoint import check_free, clear_disk_errors, read_config, staged_directory
from hf_lrq.checkpoint.leftovers import Held
from hf_lrq.errors import CheckpointError


def model_in(folder: Path, text: str = "{}") -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_dead_processes_go_with_the_next_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_in(tmp_path / "out")
    model_in(tmp_path / ".out.0123abcd.tmp")
    model_in(tmp_path / ".out.0123abcd.old")
    model_in(tmp_path / ".other.0123abcd.tmp")
    with staged_directory(tmp_path / "out", overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert names(tmp_path) == [".other.0123abcd.tmp", "out"]
    assert "deleted" in caplog.text
    assert ".out.0123abcd.tmp" in caplog.text


def test_a_save_that_runs_keeps_its_folder(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as staging:
        check_free(tmp_path / "out")
        assert staging.is_dir()
    # Neither is it taken for dead while it is checked whether it can be locked.
    with Held.new(tmp_path / "other") as held, pytest.raises(BlockingIOError):
        Held(held.path)


def test_a_hidden_model_comes_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_in(tmp_path / ".out.0123abcd.old", '{"a": 1}')
    with pytest.raises(CheckpointError, match=r"killed\. The model is in .*\.out\.0123abcd\.old; rename that to out"):
        read_config(tmp_path / "out")
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="is not empty"):
        check_free(tmp_path / "out")
    assert "it is back" in caplog.text
    assert read_config(tmp_path / "out") == {"a": 1}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Make room on this disk"),
        (OSError(errno.EROFS, "Read-only file system"), "Choose a folder on a disk that can be written to"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Make room on its disk"),
    ],
)
def test_errors_of_disks_name_the_folder_and_the_remedy(error: Exception, remedy: str, tmp_path: Path) -> None:
    message = rf"{tmp_path.name}/out cannot be written: .*\. {remedy}"
    with pytest.raises(CheckpointError, match=message), staged_directory(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), clear_disk_errors(tmp_path):
        raise ConnectionError("no network")
