import functools
import json

import pytest
import small_text_model
import text_to_image
import torch
from PIL import Image


class Few(small_text_model.CaptionedFashion):
    """Noise with captions, where there is no Fashion-MNIST."""

    def __init__(self, part="train"):
        rng = torch.Generator().manual_seed(0)
        self.labels = torch.arange(60) % 10
        self.images = torch.rand(60, 1, 16, 16, generator=rng) * 2 - 1


def test_the_example_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_to_image, "CaptionedFashion", Few)
    monkeypatch.setattr("sys.argv", [
        "text_to_image.py", "--output_dir", str(tmp_path), "--vae_steps", "2", "--teacher_steps", "2",
        "--student_steps", "2", "--num_images", "20", "--jobs", "1",
    ])  # fmt: skip
    monkeypatch.setattr(text_to_image, "TEACHER_STEPS", 3)
    fit = functools.partial(text_to_image.DomainClassifier.fit, steps=2)
    monkeypatch.setattr(text_to_image.DomainClassifier, "fit", fit)
    text_to_image.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["model"] for row in rows] == ["teacher", *(name for name in text_to_image.STUDENTS for _ in range(3))]
    assert all(0 <= row["right"] <= 1 and row["fid"] > 0 for row in rows)
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    assert Image.open(tmp_path / "samples.png").width > 1000
    assert (tmp_path / "lcm-lora" / "pytorch_lora_weights.safetensors").exists()


def test_captions_say_what_is_shown():
    captions = [small_text_model.caption(kind, row) for kind in range(10) for row in range(4)]
    assert len(set(captions)) == 40
    assert all(small_text_model.KINDS[place // 4] in caption for place, caption in enumerate(captions))


@pytest.mark.parametrize("kind", small_text_model.KINDS)
def test_words_are_few_tokens(kind):
    captions = [small_text_model.caption(kind, row) for kind in range(10) for row in range(4)]
    tokenizer = small_text_model.make_tokenizer(captions)
    tokens = tokenizer(f"a photo of a {kind}").input_ids
    assert len(tokens) < small_text_model.TOKENS
    assert tokenizer.decode(tokens[1:-1]).strip() == f"a photo of a {kind}".replace("-", " - ")
