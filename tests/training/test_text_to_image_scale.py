"""The same text-to-image training on one process, on two, and sharded."""

import pytest
import torch
from launching import launch, losses, run
from safetensors.torch import load_file
from test_text_to_image import latents

from cm_diffusers import load_pipeline

TEXT = {
    "env": {"TINY_TEXT": "1"},
    "max_train_steps": 3,
    "checkpoint_steps": 2,
    "caption_dropout": 0.2,
    "num_samples": 2,
}


@pytest.mark.parametrize("changes", [{"w_min": 1.0, "w_max": 4.0}, {"lora_rank": 2, "conversion_steps": 0}])
def test_two_ranks_equal_one_process(tmp_path, changes):
    run(tmp_path / "one", batch_size=8, **changes, **TEXT)
    run(tmp_path / "two", ranks=2, batch_size=4, **changes, **TEXT)
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert expected.keys() == found.keys()
    assert all(found[step] == pytest.approx(loss, rel=1e-5) for step, loss in expected.items())
    whole, split = (max((tmp_path / name / "checkpoints").glob("step-*")) for name in ("one", "two"))
    for file in whole.glob("*.safetensors"):
        other = load_file(split / file.name)
        # A gradient that is nearly zero has no sure sign, and Adam's steps have the size of the learning rate.
        assert all((value - other[name]).abs().max() < 5e-4 for name, value in load_file(file).items())


def test_a_sharded_student_equals_one_process_and_is_saved_whole(tmp_path):
    changes = {"w_min": 1.0, "w_max": 4.0, **TEXT}
    run(tmp_path / "one", batch_size=8, **changes)
    run(tmp_path / "two", ranks=2, batch_size=4, launcher=launch("fsdp2-text", "--num_processes", "2"), **changes)
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert all(found[step] == pytest.approx(loss, rel=1e-5) for step, loss in expected.items())
    images = latents(load_pipeline(tmp_path / "two"), 3.0, steps=1)
    torch.testing.assert_close(images, latents(load_pipeline(tmp_path / "one"), 3.0, steps=1), rtol=1e-3, atol=1e-3)


def test_adapters_are_not_sharded(tmp_path):
    changes = {"lora_rank": 2, "conversion_steps": 0, **TEXT}
    with pytest.raises(AssertionError, match="does not go with FSDP"):
        run(tmp_path, batch_size=4, launcher=launch("fsdp2", "--num_processes", "1"), **changes)
