"""Evaluations of students that make images of text: prompts, CLIP scores and the command."""

import pytest
import torch
from PIL import Image
from stable_diffusion import make_stable_diffusion
from text_students import CAPTIONS, Corners, make_captioned, make_text_student, save_clip, save_text_student

from cm_diffusers.cli import main
from cm_diffusers.evaluation import (
    Evaluator,
    Prompts,
    Reference,
    Report,
    Sampler,
    load_clip,
    load_features,
    text_student_sampler,
)

REAL = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = Prompts(("a cat", "the dog", "left"), "three")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A student, its adapters, its teacher, a CLIP model and captioned images on disk."""
    folder = tmp_path_factory.mktemp("text")
    save_text_student(folder / "student")
    save_text_student(folder / "adapters", "adapters")
    make_stable_diffusion().save_pretrained(folder / "teacher")
    save_clip(folder / "tiny-clip", seed=3)  # one that likes some of these images, and tells prompts apart
    make_captioned().save_to_disk(folder / "cats")
    return folder


def evaluator(clip=None, prompts=PROMPTS, **changes):
    arguments = {"num_images": 8, "batch_size": 3, **changes}
    reference = Reference(REAL, "noise")
    return Evaluator(load_features(Corners()), reference, prompts=prompts, clip=clip, **arguments)


# CLIP scores as a metric


def test_each_image_is_measured_against_its_own_prompt(shared):
    clip, sampler = load_clip(shared / "tiny-clip"), text_student_sampler(make_text_student(), 2, PROMPTS.texts)
    found = evaluator(clip).measure(sampler)
    scores = clip.score(sampler.draw(range(8)), [PROMPTS.texts[seed % 3] for seed in range(8)])
    assert found.metrics["clip_score"] == pytest.approx(float(scores.mean()), rel=1e-3)
    assert scores.mean() > 0 and scores.std() > 1
    assert list(found.metrics)[-1] == "clip_score"
    assert evaluator(clip, batch_size=8).measure(sampler).metrics == pytest.approx(found.metrics, rel=1e-3)


def test_repetitions_go_on_with_the_prompts(shared):
    clip, sampler = load_clip(shared / "tiny-clip"), text_student_sampler(make_text_student(), 1, PROMPTS.texts)
    found = evaluator(clip, num_images=4, repeats=2).measure(sampler)
    scores = clip.score(sampler.draw(range(8)), [PROMPTS.texts[seed % 3] for seed in range(8)])
    assert found.metrics["clip_score"] == pytest.approx(float(scores.mean()), rel=1e-3)
    assert "clip_score" in found.spread


def test_the_protocol_names_prompts_and_clip(shared):
    clip = load_clip(shared / "tiny-clip")
    protocol = evaluator(clip).protocol
    assert (protocol.prompts, protocol.prompts_digest) == ("3 of three", PROMPTS.digest)
    assert (protocol.clip, protocol.clip_digest) == ("tiny-clip", clip.digest)
    assert evaluator().protocol.clip == evaluator(prompts=None).protocol.prompts == ""


def test_images_of_other_prompts_are_refused(shared):
    sampler = text_student_sampler(make_text_student(), 1, ["another"])
    with pytest.raises(ValueError, match="images of the student are made of other prompts than those of the protocol"):
        evaluator().measure(sampler)
    with pytest.raises(ValueError, match="other prompts"):
        evaluator(prompts=None).measure(sampler)
    with pytest.raises(ValueError, match="other prompts"):
        evaluator().fid(Sampler("student", "test", 1, lambda seeds: REAL[: len(seeds)]))


def test_clip_needs_prompts(shared):
    with pytest.raises(ValueError, match="`clip` .* needs `prompts`"):
        evaluator(load_clip(shared / "tiny-clip"), prompts=None)


# The command


def evaluate(shared, folder, student="student", *options):
    main([
        "evaluate", str(shared / student), "--dataset", str(shared / "cats"), "--features",
        "text_students:Corners", "--num_images", "6", "--batch_size", "4", "--output_dir", str(folder), *options,
    ])  # fmt: skip
    return Report.load(folder / "report.json")


def test_a_student_and_its_teacher_stand_in_one_table(shared, tmp_path, capsys, monkeypatch):
    teacher = ("--teacher", str(shared / "teacher"), "--teacher_nfes", "3")
    clip = ("--clip", str(shared / "tiny-clip"))
    evaluate(shared, tmp_path / "out", "student", "--nfes", "1", *clip, *teacher)
    report = evaluate(shared, tmp_path / "out", "student", "--nfes", "2", "--caption_column", "text", *clip)
    assert [(r.model, r.sampler, r.nfe) for r in report.results] == [
        ("student", "multistep consistency, guidance 8.5", 1), ("teacher", "DDIM, guidance 7.5", 6),
        ("student", "multistep consistency, guidance 8.5", 2),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "| CLIP score ↑ |" in printed and "6 images (3 x 16 x 16, 8 bits) against 24 of cats/train" in printed
    assert "prompts: 6 of the captions of cats/train [" in printed and "CLIP: tiny-clip [" in printed
    assert report.protocol.prompts_digest == Prompts(tuple(CAPTIONS[i] for i in (0, 4, 9, 13, 18, 23)), "").digest
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "fid.png", "clip_score.png", "neighbours.png", "samples-student-nfe-1.png",
        "samples-student-nfe-2.png", "samples-teacher-nfe-6.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "out" / "clip_score.png").size == (900, 600)
    monkeypatch.setattr(Evaluator, "measure", None)
    with pytest.raises(SystemExit, match="different protocols cannot stand in one table: clip: 'tiny-clip' and ''"):
        evaluate(shared, tmp_path / "out", "student", "--nfes", "1")


def test_adapters_are_measured_on_their_base(shared, tmp_path):
    report = evaluate(shared, tmp_path, "adapters", "--base", str(shared / "teacher"), "--nfes", "1")
    assert [(r.model, r.sampler, r.nfe) for r in report.results] == [("student", "multistep consistency", 1)]
    with pytest.raises(SystemExit, match="pass `base`"):
        evaluate(shared, tmp_path, "adapters", "--nfes", "1")


def test_prompts_may_be_lines_of_a_file(shared, tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    report = evaluate(shared, tmp_path, "student", "--nfes", "1", "--prompts_file", str(tmp_path / "mine.txt"))
    assert report.protocol.prompts == "2 of mine.txt"
    with pytest.raises(SystemExit, match="from one of them, not both"):
        evaluate(shared, tmp_path, "student", "--prompts_file", "mine.txt", "--caption_column", "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher_solver", "heun"), "`teacher_solver` is for images without text"),
        (("--guidance_scale", "0.5"), "`guidance_scale` must be at least 1"),
        (("--base", "teacher"), "`base` is for adapters"),
        (("--caption_column", "nothing"), "no caption column 'nothing'"),
        (("--clip", "/nowhere"), "no CLIP model"),
    ],
)
def test_what_does_not_go_with_text_ends_the_command(shared, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"cm-diffusers evaluate: error: .*{message}"):
        evaluate(shared, tmp_path, "student", *options)


@pytest.fixture
def pixels(shared):
    import diffusers
    from conftest import build_unet

    from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler

    if not (shared / "pixels").exists():
        ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(shared / "pixels")
        diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(shared / "pixel-teacher")


@pytest.mark.parametrize("name", ["caption_column", "prompts_file", "clip", "base"])
def test_what_needs_text_is_refused_without(shared, pixels, tmp_path, name):
    with pytest.raises(SystemExit, match=f"`{name}` is for (students that make images of text|adapters)"):
        evaluate(shared, tmp_path, "pixels", f"--{name}", "x")


def test_a_teacher_makes_what_its_student_does(shared, pixels, tmp_path):
    with pytest.raises(SystemExit, match="`teacher` must make images of text"):
        evaluate(shared, tmp_path, "student", "--teacher", str(shared / "pixel-teacher"))
    with pytest.raises(SystemExit, match="makes images of text, and needs prompts"):
        evaluate(shared, tmp_path, "pixels", "--teacher", str(shared / "teacher"))
