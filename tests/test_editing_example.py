import editing
import pytest
import torch
from conftest import build_unet
from diffusers import EDMEulerScheduler
from PIL import Image
from small_images import EMOJI, load_emoji

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler

ORIGINALS = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
COLOURS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def student(channels):
    unet = build_unet(in_channels=channels, out_channels=channels, sample_size=16)
    pipe = ConsistencyPipeline(unet, ConsistencyScheduler(num_levels=200))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("edit", [*editing.SHAPES, editing.COLOURS], ids=lambda edit: edit.name)
def test_every_edit_is_measured_beside_its_baseline(edit):
    originals = COLOURS if edit is editing.COLOURS else ORIGINALS
    found = editing.measure(edit, student(originals.shape[1]), originals, lambda images: float(images.mean()))
    assert list(found["steps"]) == ["1", "2", "4", "40"]
    assert all(0 < figures["psnr"] < 40 for figures in (found["baseline"], *found["steps"].values()))
    text = editing.report([found], {"fashion": 6, "emoji": 6})
    assert text.count(" / ") == 6 and edit.baseline_name in text


def test_the_measure_of_an_image_by_itself_is_its_noise():
    noisy = ORIGINALS + 0.1
    assert editing.psnr(noisy, ORIGINALS) == pytest.approx(20)
    assert editing.mean_fill(editing.without_box(torch.full((1, 1, 16, 16), 0.3))).min() == pytest.approx(0.3)


def test_the_picture_shows_every_edit(tmp_path):
    teacher = (build_unet(in_channels=1, out_channels=1, sample_size=16), EDMEulerScheduler())
    pipe = student(1)
    panels = {edit.name: editing.rows_of(edit, pipe, ORIGINALS) for edit in editing.SHAPES}
    panels |= {"strokes": editing.stroke_rows(pipe, ORIGINALS), "walks": editing.walk_rows(pipe, teacher, ORIGINALS)}
    assert all(len(images) == 6 for rows in panels.values() for _, images in rows)
    editing.draw(panels, tmp_path / "editing.png")
    assert Image.open(tmp_path / "editing.png").width > 1000


def test_emoji_are_coloured_pictures_on_white():
    try:
        images = load_emoji()
    except ValueError as error:
        assert EMOJI in str(error)
        pytest.skip(str(error))
    assert len(images) > 1000 and images.shape[1:] == (3, 16, 16)
    assert images.max() == 1 and -1 <= images.min() < -0.9
    assert (images[:, :, 0, 0].mean() > 0.9) and (images.amax(1) - images.amin(1)).amax((1, 2)).gt(
        0.5
    ).float().mean() > 0.5
