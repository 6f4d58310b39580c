"""Students elsewhere: stock diffusers classes, and onnxruntime."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_unet
from test_text_students import write_record

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main
from cm_diffusers.hub import export_to_diffusers, export_to_onnx, render_card
from cm_diffusers.hub.student import Student
from cm_diffusers.hub.usage import usage

NOISE = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def student(scheduler=None, stock=False, boundary="euler", image_range=None, flow_map=False, original=None, **config):
    scheduler = scheduler or diffusers.DDPMScheduler(prediction_type="v_prediction")
    how = {"family": "consistency"} if stock else {"boundary": boundary, "original_inference_steps": original}
    scheduler = ConsistencyScheduler.from_teacher(scheduler, image_range=image_range, flow_map=flow_map, **how)
    pipeline = ConsistencyPipeline(build_unet(**config), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, **arguments):
    return pipeline(batch_size=3, latents=NOISE, output_type="np", **arguments).images


@pytest.mark.parametrize("classes", [None, 5])
def test_a_consistency_student_is_stock_to_the_bit(classes, tmp_path, capfd):
    pipeline = student(diffusers.EDMEulerScheduler(), stock=True, num_class_embeds=classes)
    assert export_to_diffusers(pipeline, tmp_path) is diffusers.ConsistencyModelPipeline
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert "were passed to" not in capfd.readouterr().err  # unknown keys of the config
    labels = {"class_labels": [2, 0, 1]} if classes else {}
    for arguments in ({"num_inference_steps": 1}, {"timesteps": [22, 0], "num_inference_steps": None}):
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        stock_images = images(stock, generator=generators[0], **labels, **arguments)
        np.testing.assert_array_equal(images(pipeline, generator=generators[1], **labels, **arguments), stock_images)


def test_students_of_two_sizes_are_not_stock(tmp_path):
    pipeline = student(diffusers.EDMEulerScheduler(), stock=True, sample_size=(8, 12))
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ConsistencyPipeline"
    loaded = ConsistencyPipeline.from_pretrained(tmp_path)
    found = [pipe(generator=torch.manual_seed(0), output_type="np").images for pipe in (pipeline, loaded)]
    assert found[0].shape == (1, 8, 12, 3)
    np.testing.assert_allclose(*found, atol=1e-5)
    with pytest.raises(ValueError, match="not one number"):
        export_to_diffusers(loaded, tmp_path / "stock")
    assert "not one number" in usage(Student(tmp_path, "name/student"))


def test_stored_levels_are_said_to_stock_as_timesteps(tmp_path, capsys):
    levels = ConsistencyScheduler(num_train_timesteps=18)
    levels.set_timesteps(timesteps=[11, 0])
    scheduler = ConsistencyScheduler(num_train_timesteps=18, few_step_sigmas={"2": levels.sigmas[:2].tolist()})
    pipeline = ConsistencyPipeline(build_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "student")
    main(["export", str(tmp_path / "student"), str(tmp_path / "stock")])
    assert "For the images of 2 steps here, pass it `timesteps=[11, 0]`" in capsys.readouterr().out
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    ours, same, other = (
        images(pipe, generator=torch.Generator().manual_seed(7), **arguments)
        for pipe, arguments in (
            (pipeline, {"num_inference_steps": 2}),
            (stock, {"num_inference_steps": None, "timesteps": scheduler.stock_timesteps(2)}),
            (stock, {"num_inference_steps": 2}),
        )
    )
    np.testing.assert_allclose(ours, same, atol=1e-5)
    assert abs(ours - other).max() > 1e-2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "original"), [(1, None), (1, 25), (4, 25)])
def test_a_student_of_the_lcm_form_runs_under_lcm_scheduler(prediction_type, steps, original, tmp_path, monkeypatch):
    pipeline = student(diffusers.DDPMScheduler(prediction_type=prediction_type), boundary="lcm", original=original)
    assert export_to_diffusers(pipeline, tmp_path) is diffusers.DDPMPipeline
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is diffusers.LCMScheduler
    stock.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules[diffusers.DDPMPipeline.__module__], "randn_tensor", lambda *_, **__: NOISE.clone())
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    theirs = stock(batch_size=3, num_inference_steps=steps, output_type="np", generator=generators[0]).images
    ours = images(pipeline, num_inference_steps=steps, generator=generators[1])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # of an epsilon times 157


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: student(), "its family is 'vp' and its boundary 'euler'"),
        (lambda: student(diffusers.FlowMatchEulerDiscreteScheduler()), "its family is 'flow'"),
        (lambda: student(boundary="lcm", num_class_embeds=5), "DDPMPipeline passes no class labels"),
        (lambda: student(boundary="lcm", image_range=[0.0, 1.0]), r"its images lie in \[0.0, 1.0\]"),
    ],
)
def test_what_is_not_stock_is_refused_with_the_reason(make, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_to_diffusers(make(), tmp_path)


@pytest.mark.parametrize(
    ("classes", "flow_map", "boundary"),
    [(None, False, "euler"), (None, False, "lcm"), (5, False, "euler"), (None, True, "euler")],
)
def test_onnxruntime_draws_the_same_images(classes, flow_map, boundary, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pipeline = student(
        num_class_embeds=classes, flow_map=flow_map, class_embed_type="timestep" if flow_map else None,
        boundary=boundary,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(export_to_onnx(pipeline, tmp_path)))
    for count in (1, 3):
        labels = np.arange(count, dtype=np.int64)
        inputs = {"noise": NOISE[:count].numpy()} | ({"class_labels": labels} if classes else {})
        (found,) = session.run(["images"], inputs)
        expected = pipeline(
            batch_size=count, latents=NOISE[:count], output_type="pt", class_labels=labels if classes else None
        ).images
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_command_exports(tmp_path, capsys):
    student(boundary="lcm").save_pretrained(tmp_path / "student")
    write_record(tmp_path / "student")
    main(["export", str(tmp_path / "student"), str(tmp_path / "stock")])
    assert "loads with diffusers.DDPMPipeline" in capsys.readouterr().out
    card = str(render_card(tmp_path / "stock", "me/stock"))
    assert "license: mit" in card and "me/sd" in card
    code = (
        "import sys\nsys.modules['cm_diffusers'] = None\nfrom diffusers import DiffusionPipeline\n"
        f"print(DiffusionPipeline.from_pretrained({str(tmp_path / 'stock')!r})(num_inference_steps=2).images[0].size)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "(8, 8)", result.stderr
    pytest.importorskip("onnxruntime")
    main(["export", str(tmp_path / "student"), str(tmp_path / "onnx"), "--format", "onnx"])
    assert (tmp_path / "onnx" / "model.onnx").exists()
