"""CLIP scores against the formula, on a tiny model of random weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion import make_stable_diffusion, make_tokenizer
from text_students import CLIP_SIZE, save_clip
from transformers import CLIPModel

from cm_diffusers.evaluation import load_clip

PROMPTS = ["a cat", "the dog", "", "left, right, left, right, left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder)


def pictures(count, height, width, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def expected_scores(folder, pixels, prompts):
    """100 max(cos, 0), one pair at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), make_tokenizer()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    scores = []
    for image, prompt in zip(pixels, prompts, strict=True):
        seen = model.vision_model(((image.float() / 255 - mean) / std)[None]).pooler_output
        read = model.text_model(tokenizer(prompt, return_tensors="pt")["input_ids"]).pooler_output
        a, b = model.visual_projection(seen)[0], model.text_projection(read)[0]
        scores.append(max(100 * float(a @ b / (a.norm() * b.norm())), 0.0))
    return torch.tensor(scores)


def test_scores_are_clipped_cosines(clip, folder):
    images, prompts = pictures(20, CLIP_SIZE, CLIP_SIZE), PROMPTS * 5
    found = clip.score(images, prompts)
    torch.testing.assert_close(found, expected_scores(folder, images, prompts), rtol=1e-4, atol=1e-3)
    assert (found == 0).any() and (found > 1).any() and found.max() <= 100


def test_images_are_resized_and_cropped_as_the_processor_says(clip, folder):
    images = pictures(4, 24, 36)
    seen = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((18, CLIP_SIZE), Image.Resampling.BICUBIC)
        seen.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, :, 3:15])
    expected = expected_scores(folder, torch.stack(seen), PROMPTS)
    torch.testing.assert_close(clip.score(images, PROMPTS), expected, rtol=0, atol=1.0)  # resized by other code


def test_grey_images_become_rgb(clip):
    grey = pictures(4, 16, 16, channels=1)
    torch.testing.assert_close(clip.score(grey, PROMPTS), clip.score(grey.expand(-1, 3, -1, -1), PROMPTS))


def test_batches_change_nothing(clip, monkeypatch):
    images = pictures(4, 16, 16)
    whole = clip.score(images, PROMPTS)
    monkeypatch.setattr("cm_diffusers.evaluation.clip_score.BATCH_SIZE", 3)
    torch.testing.assert_close(clip.score(images, PROMPTS), whole, rtol=1e-4, atol=1e-4)


def test_long_prompts_are_cut_off(clip):
    long = "a" * 75 + " b"
    scores = clip.score(pictures(1, 16, 16).expand(2, -1, -1, -1), [long, long + "c"])
    assert scores[0] == scores[1]


def test_the_digest_tells_models_and_processors_apart(clip, folder, tmp_path):
    assert clip.name == "tiny-clip"
    assert load_clip(folder).digest == clip.digest != load_clip(save_clip(tmp_path / "other", seed=1)).digest
    shutil.copytree(folder, tmp_path / "larger")
    config = tmp_path / "larger" / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"shortest_edge": 12', '"shortest_edge": 14'))
    assert load_clip(tmp_path / "larger").digest != clip.digest


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8), ["a", "b"], TypeError, "in uint8, got .* in torch.float32"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), ["a", "b"], TypeError, "3 or 1"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a"], ValueError, "each of the 2 images, got 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(clip, images, prompts, error, message):
    with pytest.raises(error, match=message):
        clip.score(images, prompts)


def test_only_a_whole_clip_model_in_safetensors_is_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match="no CLIP model with weights in safetensors at .*nowhere"):
        load_clip(tmp_path / "nowhere")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no CLIP model with weights in safetensors"):
        load_clip(pickled)
    half = shutil.copytree(folder, tmp_path / "half")
    make_stable_diffusion().text_encoder.save_pretrained(tmp_path / "encoder")
    shutil.copy(tmp_path / "encoder" / "model.safetensors", half / "model.safetensors")
    with pytest.raises(ValueError, match="weights are missing"):
        load_clip(half)
    (half / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no CLIP model"):
        load_clip(half)
