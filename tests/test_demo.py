from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main

pytest.importorskip("gradio")

from cm_diffusers.demo import build_demo, draw_images, enlarge, load_models, read_canvas  # noqa: E402
from cm_diffusers.evaluation import student_sampler  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a student and its teacher, with five classes."""
    folder = tmp_path_factory.mktemp("models")
    teacher = DDPMPipeline(build_unet(num_class_embeds=5), DDPMScheduler())
    teacher.save_pretrained(folder / "teacher")
    scheduler = ConsistencyScheduler.from_teacher(DDPMScheduler(), num_levels=18)
    ConsistencyPipeline(build_unet(num_class_embeds=5), scheduler).save_pretrained(folder / "student")
    return folder / "student", folder / "teacher"


def test_an_enlarged_picture_is_read_back_with_its_own_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = enlarge(Image.fromarray(pixels))
    paint = np.zeros((*picture.size[::-1], 4), dtype=np.uint8)
    paint[:, : paint.shape[1] // 2, 3] = 255
    canvas = {"background": picture, "layers": [Image.fromarray(paint)], "composite": None}
    read, mask = read_canvas(canvas, (12, 8))
    assert np.array_equal(np.asarray(read), pixels)
    assert np.array_equal(np.asarray(mask), np.repeat([[255] * 6 + [0] * 6], 8, axis=0))


def test_a_class_can_be_chosen(models):
    student, _ = load_models(models[0])
    of_one = draw_images(student_sampler(student, 1, class_label=3), [0, 1])
    expected = student(
        batch_size=2, class_labels=3, generator=[torch.Generator().manual_seed(i) for i in (0, 1)]
    ).images
    for ours, theirs in zip(of_one, expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_space_is_written_whole(tmp_path):
    main(["demo", "me/my-student", "--teacher", "google/ddpm-cifar10-32", "--space", str(tmp_path)])
    app = (tmp_path / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert "load_models('me/my-student', 'google/ddpm-cifar10-32', device)" in app
    requirements = (tmp_path / "requirements.txt").read_text()
    assert re.search(r"^gradio==\d", requirements, re.M) and "extra" not in requirements
    isolated = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import cm_diffusers.demo; print(cm_diffusers.demo.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=isolated, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "cm_diffusers" / "demo.py"), done.stderr
    import yaml

    card = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["models"] == ["me/my-student", "google/ddpm-cifar10-32"]


@pytest.mark.parametrize("place", ["absolute", "relative", "typo", "deep"])
def test_a_space_of_a_folder_is_refused(models, tmp_path, monkeypatch, place):
    monkeypatch.chdir(models[0].parent)
    name = {"absolute": str(models[0]), "relative": "student", "typo": "./studnt", "deep": "me/my/student"}[place]
    with pytest.raises(SystemExit, match="cannot see the folder|is no name there"):
        main(["demo", name, "--space", str(tmp_path / "space")])
    assert not (tmp_path / "space").exists()


def test_visitors_take_turns(models):
    """A scheduler knows of one run only."""
    events = list(build_demo(*load_models(*models)).fns.values())
    assert len(events) == 4
    assert {(event.concurrency_id, event.concurrency_limit) for event in events} == {("models", 1)}


def test_models_that_cannot_be_drawn_from_are_refused_at_the_start(models):
    student, teacher = load_models(*models)
    sizeless = ConsistencyPipeline(build_unet(sample_size=None), ConsistencyScheduler())
    with pytest.raises(ValueError, match="student's UNet has no `sample_size`"):
        build_demo(sizeless)
    teacher = dataclasses.replace(teacher, unet=build_unet(num_class_embeds=3))
    with pytest.raises(ValueError, match="classes that the teacher has not"):
        build_demo(student, teacher)


def test_the_thinnest_stroke_is_seen():
    paint = np.zeros((512, 512, 4), dtype=np.uint8)
    paint[100:102, 100:102, 3] = 255
    canvas = {"background": Image.new("RGB", (512, 512)), "layers": [Image.fromarray(paint)], "composite": None}
    assert np.asarray(read_canvas(canvas, (8, 8))[1]).sum() == 255


def test_without_gradio_it_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="pip install gradio"):
        main(["demo", str(models[0]), "--device", "cpu"])


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(models, monkeypatch) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    demo = build_demo(*load_models(*models))
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(120_000)
        tab.goto(address)
        tab.wait_for_selector("#draw")
        yield tab
        browser.close()
    demo.close()


def fetch(page: Any, selector: str) -> np.ndarray:
    """An image that the page shows, in the model's 8 x 8 pixels."""
    picture = Image.open(io.BytesIO(page.request.get(page.get_attribute(selector, "src")).body()))
    return np.asarray(picture.convert("RGB").resize((8, 8), Image.Resampling.BOX)).astype(int)


def test_a_student_is_sampled_and_a_picture_repainted_in_a_browser(page, models, tmp_path):
    page.click("#draw")
    page.wait_for_selector("#student img")
    page.wait_for_selector("#teacher img")
    assert page.inner_text("#student-time").startswith("1 evaluation,")
    assert page.inner_text("#teacher-time").startswith("35 evaluations,")
    assert page.locator("#student img").count() >= 4

    page.fill("#steps input[type=number]", "3")
    page.keyboard.press("Enter")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#student-time').innerText.startsWith('3 evaluations')")

    page.get_by_role("tab", name="Edit").click()
    page.click("#edit-draw")
    canvas = page.locator("#canvas canvas").first
    page.wait_for_function("document.querySelector('#canvas .zoom-number') !== null")
    page.wait_for_timeout(2000)  # the canvas is laid out anew for the picture
    page.screenshot(path=tmp_path / "drawn.png")
    box = canvas.bounding_box()
    middle, top, bottom = box["x"] + box["width"] / 2, box["y"] + 40, box["y"] + box["height"] - 40
    page.mouse.move(middle, top)
    page.mouse.down()
    page.mouse.move(middle, bottom, steps=20)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.click("#repaint")
    page.wait_for_selector("#result img")
    page.screenshot(path=tmp_path / "repainted.png")

    student, _ = load_models(models[0])
    drawn = np.asarray(draw_images(student_sampler(student, 1), [0])[0]).astype(int)
    changed = abs(fetch(page, "#result img") - drawn).max(axis=-1) > 1
    assert not changed[:, [0, 1, 6, 7]].any(), "what is not painted over stays"
    assert changed[2:6, 3:5].mean() > 0.8, "what is painted over is drawn anew"
