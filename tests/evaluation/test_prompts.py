"""Prompts of images that are measured: lines of a file, or captions of a dataset."""

import datasets
import numpy as np
import pytest
import torch
from text_students import CAPTIONS, make_captioned

from cm_diffusers.evaluation import Prompts
from cm_diffusers.training.data import prepare_dataset
from cm_diffusers.training.images import ImageSpec

SPEC = ImageSpec(3, 16, 16)


def test_lines_of_a_file_are_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  ein Bär \nlast", encoding="utf-8")
    prompts = Prompts.from_file(tmp_path / "prompts.txt")
    assert prompts.texts == ("a cat", "ein Bär", "last")
    assert str(prompts) == "3 of prompts.txt"


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "none in prompts.txt"), (b"\xff", "cannot be read"), (None, "cannot be read")]
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Prompts.from_file(tmp_path / "prompts.txt")


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 11, 23]), (24, range(24)), (100, range(24))])
def test_captions_are_spread_evenly(count, expected):
    prepared = prepare_dataset(make_captioned(), SPEC, captioned=True)
    prompts = Prompts.from_dataset(prepared, "cats/train", count)
    assert prompts.texts == tuple(CAPTIONS[row] for row in expected)
    assert str(prompts) == f"{len(expected)} of the captions of cats/train"


def test_no_image_is_read_for_a_caption(monkeypatch):
    prepared = prepare_dataset(make_captioned(), SPEC, caption_column="text")
    monkeypatch.setattr(type(prepared), "__getitem__", None)
    assert len(Prompts.from_dataset(prepared, "cats", 5).texts) == 5


def test_of_a_stream_they_are_the_first():
    prepared = prepare_dataset(make_captioned().to_iterable_dataset(), SPEC, captioned=True)
    assert Prompts.from_dataset(prepared, "cats", 5).texts == tuple(CAPTIONS[:5])


def test_of_several_captions_it_is_the_first():
    table = make_captioned().remove_columns("text")
    table = table.add_column("captions", [[f"one {i}", f"two {i}"] for i in range(len(table))])
    prepared = prepare_dataset(table, SPEC, captioned=True)
    assert Prompts.from_dataset(prepared, "cats", 2).texts == ("one 0", "one 23")


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        return torch.full((3, 16, 16), row / 4), f"row {row}"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (Pairs()[row] for row in range(4))


@pytest.mark.parametrize("data", [Pairs, Stream])
def test_torch_datasets_have_captions_too(data):
    prepared = prepare_dataset(data(), SPEC, captioned=True)
    assert Prompts.from_dataset(prepared, "pairs", 4).texts == ("row 0", "row 1", "row 2", "row 3")


def test_the_digest_is_that_of_texts_in_their_order():
    assert Prompts(("a", "b"), "x").digest == Prompts(("a", "b"), "y").digest != Prompts(("b", "a"), "x").digest
    assert Prompts(("a", "b"), "x").digest != Prompts(("a,b",), "x").digest


def test_captions_of_bytes_are_texts():
    rows = {"image": list(np.zeros((2, 16, 16, 3), dtype=np.uint8)), "txt": [b"one", b"two"]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "txt": datasets.Value("binary")})
    )
    prepared = prepare_dataset(table, SPEC, captioned=True)
    assert Prompts.from_dataset(prepared, "bytes", 2).texts == ("one", "two")
