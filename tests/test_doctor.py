"""What a run would meet, known before it starts."""

from __future__ import annotations

import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer, doctor
from cm_diffusers.cli import main
from cm_diffusers.training.footprint import Kept

IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def make_config(folder, **changes):
    values = {"distance": "pseudo_huber", "batch_size": 4, "teacher_check": False, "output_dir": str(folder / "out")}
    return ConsistencyConfig(**{**values, **changes})


def examine(folder, images=IMAGES, **changes):
    return doctor.examine(make_config(folder, **changes), (build_unet(), diffusers.DDPMScheduler()), images)


def test_a_run_that_will_go_well(tmp_path):
    found = examine(tmp_path)
    report = str(found)
    facts = (
        f"torch        {torch.__version__.split('+')[0]}",
        "UNet2DModel of",
        "images of 3 x 8 x 8",
        "DDPMScheduler, epsilon",
        "16 images",
        "boundary euler",
        "loads in stock diffusers: no",
        "10000 of conversion, then 100000 of cd",
        "activations of 4 images",
        "for 1,000 steps",
    )
    for fact in facts:
        assert fact in report
    assert found.warnings == []
    assert found.seconds_per_step > 0
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_steps_that_the_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="`sample_nfes` holds 60"):
        examine(tmp_path, sample_nfes=[60])


def test_the_repository_is_the_runs_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cm_diffusers.hub.publisher.check_access", lambda *access: asked.append(access))
    examine(tmp_path, push_to_hub=True, hub_token="hf_mine")
    assert asked == [("out", "hf_mine")]


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_waiting_long_for_images_is_told(tmp_path, monkeypatch, long):
    monkeypatch.setattr(doctor, "LONG_WAIT", long)
    assert ("A step waits for its images: raise `num_workers`, now 0" in str(examine(tmp_path))) == (long == 0)


def test_weights_are_counted_and_activations_follow_the_batch(tmp_path):
    weights = sum(parameter.nbytes for parameter in build_unet().parameters())
    four, eight = (examine(tmp_path, batch_size=size).footprint for size in (4, 8))
    assert (four.student, four.teacher, four.gradients) == (weights, weights, weights)
    assert (four.averages, four.optimizer) == (2 * weights, 2 * weights)
    assert eight.activations == pytest.approx(2 * four.activations, rel=0.02)
    assert examine(tmp_path, target="student").footprint.averages == weights
    assert examine(tmp_path, teacher_dtype="bfloat16").footprint.teacher == weights / 2


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}], ids=str)
def test_the_estimate_is_close_to_the_measured_peak(changes, tmp_path):
    config = make_config(tmp_path, batch_size=16, **changes)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    teacher = build_unet(sample_size=32, block_out_channels=(16, 16), down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = ConsistencyTrainer(config, (teacher, diffusers.DDPMScheduler()), images)
        trainer.step = trainer.phases[-1].start
        batches = iter(trainer.batches)
        for _ in range(2):
            trainer.advance(trainer.phases[-1], batches)
    estimate = doctor.measure_footprint(trainer)[0]
    # The teacher was there before.
    measured = peak(profiler) + estimate.teacher
    assert 0.8 < measured / estimate.total < doctor.WORKING_SPACE


def test_measuring_leaves_nothing_behind():
    network, seen = build_unet().train(), []

    class Noting(Kept):
        def _keep(self, tensor):
            seen.append(StorageWeakRef(tensor.untyped_storage()))
            return super()._keep(tensor)

    with Noting(network).counting() as kept:
        network(IMAGES[:2].clone(), torch.ones(2))
    weights = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
    assert kept.bytes > 0 and {reference.cdata for reference in seen if not reference.expired()} <= weights


def peak(profiler):
    """The most bytes in use at once."""
    in_use = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            in_use += event.nbytes()
            most = max(most, in_use)
    return most


def test_short_memory_is_known_beforehand_and_the_advice_fits(tmp_path, monkeypatch):
    plenty = examine(tmp_path)
    per_image = plenty.footprint.activations / 4
    room = int((plenty.footprint.total + 6.5 * per_image) * doctor.WORKING_SPACE)
    monkeypatch.setattr(doctor, "_bytes_free", lambda device: room)
    found = examine(tmp_path, batch_size=64)
    assert found.seconds_per_step is None  # it was not tried
    (warning,) = found.warnings
    fitting = int(re.search(r"(\d+) images fit: set `batch_size: \1` and `gradient_accumulation_steps", warning)[1])
    assert 4 < fitting < 64
    assert examine(tmp_path, batch_size=fitting).warnings == []
    assert len(examine(tmp_path, batch_size=fitting + 1).warnings) == 1


def test_weights_that_do_not_fit_are_not_even_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_bytes_free", lambda device: 1000)
    monkeypatch.setattr(doctor, "ConsistencyTrainer", None)
    found = examine(tmp_path)
    assert "Out of memory: the teacher and 6 float32 copies of its weights" in found.warnings[0]


def test_a_container_has_less_memory_than_its_host(tmp_path, monkeypatch):
    for name, content in (("memory.max", "5000"), ("memory.current", "2000")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(doctor, "CONTROL_GROUP", tmp_path)
    assert doctor._bytes_free(torch.device("cpu")) == 3000
    (tmp_path / "memory.max").write_text("max")
    assert doctor._bytes_free(torch.device("cpu")) > 2**20


def test_a_small_disk_is_known_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert any("The disk is too small" in warning for warning in examine(tmp_path).warnings)


def test_an_untrained_teacher_is_a_warning(tmp_path):
    assert any("does not denoise" in warning for warning in examine(tmp_path, teacher_check=True).warnings)


class TestCommand:
    def test_the_machine_alone(self, capsys):
        main(["doctor"])
        printed = capsys.readouterr().out
        assert "cm_diffusers" in printed and "cores" in printed

    def test_a_teacher_alone(self, tmp_path, capsys):
        diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
        main(["doctor", "--teacher", str(tmp_path)])
        printed = capsys.readouterr().out
        assert "UNet2DModel" in printed and "none given" in printed

    def test_a_warning_is_an_exit_code(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(doctor, "_bytes_free", lambda device: 1000)
        diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", "--teacher", str(tmp_path)])
        assert stopped.value.code == 1
        assert "WARNING: Out of memory" in capsys.readouterr().out

    def test_what_the_trainer_would_refuse_is_said(self, tmp_path):
        with pytest.raises(SystemExit, match="doctor: error: Cannot load a pipeline"):
            main(["doctor", "--teacher", str(tmp_path / "nothing")])
