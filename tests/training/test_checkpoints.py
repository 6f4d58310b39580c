import logging
from pathlib import Path

import pytest
from damaging import damage

from cm_diffusers.training import checkpoints
from cm_diffusers.training.checkpoints import CheckpointError


def write(root: Path, step: int, content: str = "weights") -> Path:
    def files(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(content)
        (folder / checkpoints.STATE).write_text(f'{{"step": {step}}}')

    folder = checkpoints.checkpoint_path(root, step)
    checkpoints.write_files(folder, files)
    return folder


def test_newest_whole_checkpoint_is_found(tmp_path):
    write(tmp_path, 5)
    newest = write(tmp_path, 100)
    assert checkpoints.find("auto", tmp_path) == (newest, {"step": 100})


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoints.find("auto", tmp_path) is None


@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "no text", "delete"])
@pytest.mark.parametrize("name", ["sub/weights", checkpoints.STATE, checkpoints.MANIFEST])
def test_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, how, name):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    damage(newer / name, how)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.find("auto", tmp_path) == (older, {"step": 1})
    assert str(newer) in caplog.text
    with pytest.raises(CheckpointError, match=str(newer)):
        checkpoints.find(str(newer), tmp_path)


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    only = write(tmp_path, 1)
    damage(only / "sub" / "weights", "flip")
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        checkpoints.find("auto", tmp_path)
    assert (only / "sub" / "weights").exists()


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path):
    whole = write(tmp_path, 1)

    def full_disk(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match=f"MiB are free there: No space.*The last checkpoint is {whole}"):
        checkpoints.write_files(checkpoints.checkpoint_path(tmp_path, 2), full_disk)
    assert checkpoints.find("auto", tmp_path) == (whole, {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_pruning_keeps_the_newest(tmp_path):
    folders = [write(tmp_path, step) for step in (1, 20, 3)]
    checkpoints.prune(folders[1], 2)
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_pruning_counts_no_later_checkpoint_which_the_run_could_not_use(tmp_path):
    damaged, written = write(tmp_path, 20), write(tmp_path, 15)
    damage(damaged / "sub" / "weights", "flip")
    checkpoints.prune(written, 1)
    assert checkpoints.find("auto", tmp_path) == (written, {"step": 15})


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, caplog, monkeypatch):
    folders = [write(tmp_path, step) for step in (1, 2)]

    def refuse(*_):
        raise OSError("Device or resource busy")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    checkpoints.prune(folders[1], 1)
    assert "step-00000001 cannot be deleted: Device or resource busy" in caplog.text


def test_what_a_killed_run_left_half_done_is_deleted(tmp_path):
    whole = write(tmp_path, 7)
    for name in (".step-00000008.partial", ".step-00000005.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("...")
    checkpoints.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_a_disk_that_is_full_from_the_start_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written, .* MiB are free there: .*There is no earlier"):
        write(tmp_path / "file" / "checkpoints", 1)
