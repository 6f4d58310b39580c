"""Images with captions, from every source to batches."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from cm_diffusers.training import data
from cm_diffusers.training.captions import read_captions
from cm_diffusers.training.data import load_image_dataset, prepare_dataset
from cm_diffusers.training.images import ImageSpec, ImageTransform
from cm_diffusers.training.loading import Batches, first_images

SPEC = ImageSpec(3, 8, 8, (0.0, 255.0))
REDS = range(0, 240, 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of `datasets` is left behind, or found again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(red=0, size=(8, 8)):
    return Image.new("RGB", size, (red, 0, 0))


def make_table(captions=None, column="text"):
    """Twelve pictures, each with its red as its caption."""
    captions = [f"red {red}" for red in REDS] if captions is None else captions
    return datasets.Dataset.from_dict({"image": [picture(red) for red in REDS], column: captions})


def in_columns(folder, streaming):
    table = make_table()
    return table.to_iterable_dataset(num_shards=2) if streaming else table


def in_an_image_folder(folder, streaming):
    for red in REDS:
        picture(red).save(folder / f"{red:03d}.png")
    lines = [json.dumps({"file_name": f"{red:03d}.png", "text": f"red {red}"}) for red in REDS]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return load_image_dataset(str(folder), streaming=streaming)


def in_shards(folder, streaming):
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for red in REDS[6 * shard : 6 * shard + 6]:
                jpeg = io.BytesIO()
                picture(red).save(jpeg, "jpeg", quality=100, subsampling=0)
                for suffix, content in (("jpg", jpeg.getvalue()), ("txt", f"red {red}".encode())):
                    entry = tarfile.TarInfo(f"{red:03d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return load_image_dataset(str(folder), streaming=streaming)


def in_parquet(folder, streaming):
    make_table().map(lambda row: row).to_parquet(folder / "train.parquet")
    return load_image_dataset(str(folder / "train.parquet"), streaming=streaming)


SOURCES = pytest.mark.parametrize("source", [in_columns, in_an_image_folder, in_shards, in_parquet])


def caption_of(image):
    """What an image is called, of which JPEG may have changed the colour a little."""
    return f"red {round(image[0].mean().item() / 20) * 20}"


# Sources


@SOURCES
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_each_image_with_its_caption(tmp_path, source, streaming):
    (tmp_path / "files").mkdir()
    prepared = prepare_dataset(source(tmp_path / "files", streaming), SPEC, captioned=True)
    items = list(prepared)
    assert sorted(item["captions"] for item in items) == sorted(f"red {red}" for red in REDS)
    assert all(item["captions"] == caption_of(item["images"]) for item in items)
    assert all(item["sizes"].tolist() == [8, 8, 0, 0] for item in items) and items[0]["sizes"].dtype == torch.int64


@SOURCES
@pytest.mark.parametrize(("streaming", "num_workers"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_captions_travel_with_their_images_through_batches(tmp_path, source, streaming, num_workers):
    (tmp_path / "files").mkdir()
    prepared = prepare_dataset(source(tmp_path / "files", streaming), SPEC, captioned=True)
    for batch in itertools.islice(iter(Batches(prepared, 4, seed=0, num_workers=num_workers)), 3):
        batch = send_to_device(batch, torch.device("cpu"), non_blocking=True, skip_keys=["seed"])
        assert batch["captions"] == [caption_of(image) for image in batch["images"]]
        assert batch["sizes"].shape == (4, 4)


def test_pinning_leaves_captions_as_they_are():
    assert pin_memory({"captions": ["one", "two"]}) == {"captions": ["one", "two"]}


@pytest.mark.parametrize("stream", [False, True])
def test_batches_with_captions_go_on_where_they_were(stream):
    def batches():
        table = make_table([[f"{red} {name}" for name in "abcd"] for red in REDS])
        source = table.to_iterable_dataset(num_shards=2) if stream else table
        return Batches(prepare_dataset(source, SPEC, captioned=True), 4, seed=3)

    whole = [batch["captions"] for batch in itertools.islice(iter(batches()), 9)]
    first, second = batches(), batches()
    list(itertools.islice(iter(first), 4))
    second.restore(first.state())
    assert [batch["captions"] for batch in itertools.islice(iter(second), 5)] == whole[4:]


def test_first_images_come_with_captions():
    assert first_images(prepare_dataset(make_table(), SPEC, captioned=True), 2)["captions"] == ["red 0", "red 20"]


@pytest.mark.parametrize(
    "item", [(picture(), "a"), {"image": picture(), "text": "a"}, (torch.zeros(3, 8, 8), ["a"]), (picture(), b"a")]
)
def test_torch_datasets_give_pairs_or_dicts(item):
    assert prepare_dataset([item], SPEC, captioned=True)[0]["captions"] == "a"


def test_captions_are_left_out_unless_they_are_needed():
    assert set(prepare_dataset(make_table(), SPEC)[0]) == {"images"}
    assert set(prepare_dataset([{"image": picture(), "text": "a"}], SPEC)[0]) == {"images"}
    assert set(prepare_dataset(make_table(), SPEC, caption_column="text")[0]) == {"images", "captions", "sizes"}


def test_labels_and_captions_come_together():
    table = make_table().add_column("label", [1] * 12)
    item = prepare_dataset(table, SPEC, label_column="label", num_classes=2, captioned=True)[3]
    assert item["class_labels"] == 1 and item["captions"] == "red 60"


# Columns


def test_caption_column_is_found_or_must_be_told():
    assert prepare_dataset(make_table(column="prompt"), SPEC, captioned=True)[1]["captions"] == "red 20"
    with pytest.raises(ValueError, match="`caption_column`: the dataset has image, words, of which .* captions: none"):
        prepare_dataset(make_table(column="words"), SPEC, captioned=True)
    twice = make_table().add_column("caption", ["other"] * 12)
    with pytest.raises(ValueError, match="may hold captions: text, caption"):
        prepare_dataset(twice, SPEC, captioned=True)
    assert prepare_dataset(twice, SPEC, caption_column="caption")[0]["captions"] == "other"
    with pytest.raises(ValueError, match="no caption column 'txet'; it has image, text. Did you mean 'text'"):
        prepare_dataset(make_table(), SPEC, caption_column="txet")
    with pytest.raises(ValueError, match="`caption_column`: row 0 has image, words, of which"):
        prepare_dataset([{"image": picture(), "words": "a"}], SPEC, captioned=True)


# Captions


def test_captions_are_read_from_text_bytes_and_lists():
    assert read_captions("é", "it") == read_captions("é".encode(), "it") == read_captions(["é"], "it") == ("é",)
    assert read_captions("", "it") == ("",)
    assert read_captions((b"a", "b"), "it") == ("a", "b")


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (None, "Every image must come with its caption, but row 0 has none"),
        ([], "but row 0 has none"),
        (3, "caption of row 0 must be a string, bytes in UTF-8 or a list of them, got 3"),
        (["a", None], "row 0 must be a string.*got None"),
        (b"\xff", "row 0 must be text in UTF-8"),
    ],
)
def test_what_is_no_caption_is_refused_and_never_skipped(caption, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset([(picture(), caption)], SPEC, captioned=True, on_bad_image="skip")


def test_missing_caption_of_a_column_is_found_before_training():
    captions = [None if red == 60 else "a" for red in REDS]
    with pytest.raises(ValueError, match="row 3, column 'text' has none"):
        prepare_dataset(make_table(captions), SPEC, captioned=True, on_bad_image="skip")
    stream = make_table(captions).to_iterable_dataset()
    with pytest.raises(ValueError, match="item 3 of the stream, column 'text' has none"):
        list(prepare_dataset(stream, SPEC, captioned=True, on_bad_image="skip"))


def test_images_alone_have_no_captions():
    with pytest.raises(ValueError, match="row 0 has none"):
        prepare_dataset(torch.zeros(2, 3, 8, 8), SPEC, captioned=True)


@pytest.mark.parametrize("cache", [0, 2**30])
def test_one_of_several_captions_is_chosen_by_the_seed(monkeypatch, cache):
    monkeypatch.setattr(data, "CACHE_BYTES", cache)
    prepared = prepare_dataset(make_table([["a", "b", "c"]] * 12), SPEC, captioned=True)
    chosen = [prepared[0, seed]["captions"] for seed in range(60)]
    assert chosen == [prepared[0, seed]["captions"] for seed in range(60)]
    assert all(10 <= chosen.count(caption) <= 30 for caption in "abc")


def test_captions_do_not_change_the_crop():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 30, 3), dtype=np.uint8))
    spec = ImageSpec(3, 8, 8, center_crop=False, random_flip=True)
    several, none = ImageTransform(spec, captioned=True), ImageTransform(spec)
    for seed in range(5):
        rngs = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert torch.equal(several((noise, ["a", "b"]), rngs[0])["images"], none(noise, rngs[1])["images"])


def test_skipped_image_takes_its_caption_along():
    items = [(b"no image", "bad"), (picture(), "good")]
    prepared = prepare_dataset(items, SPEC, captioned=True, on_bad_image="skip")
    assert [item["captions"] for item in prepared] == ["good", "good"]


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [((40, 20), [20, 40, 0, 4]), ((20, 40), [40, 20, 4, 0]), ((4, 4), [4, 4, 0, 0]), ((13, 8), [8, 13, 0, 2])],
)
def test_sizes_are_the_original_and_the_offset_of_the_middle(size, expected):
    assert prepare_dataset([(picture(0, size), "")], SPEC, captioned=True)[0]["sizes"].tolist() == expected


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("size", [(17, 8), (8, 17), (40, 26), (8, 8)])
def test_the_offset_is_where_the_crop_lies_in_the_resized_picture_mirrored_or_not(size, center_crop):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    whole = ImageTransform(ImageSpec(3, 8, 8, center_crop=False)).read(noise, "it")["images"]
    transform = ImageTransform(ImageSpec(3, 8, 8, center_crop=center_crop, random_flip=True), captioned=True)
    mirrored = []
    for seed in range(20):
        item = transform((noise, "a"), torch.Generator().manual_seed(seed))
        height, width, top, left = item["sizes"].tolist()
        assert (width, height) == size
        plain, flipped = (part[:, top : top + 8, left : left + 8] for part in (whole, whole.flip(-1)))
        assert torch.equal(item["images"], plain) != torch.equal(item["images"], flipped)
        mirrored.append(torch.equal(item["images"], flipped))
    assert any(mirrored) and not all(mirrored)


def test_a_picture_turned_upright_has_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(0, (16, 8)).save(tmp_path / "turned.jpg", exif=exif)
    item = prepare_dataset([(str(tmp_path / "turned.jpg"), "a")], SPEC, captioned=True)[0]
    assert item["sizes"].tolist() == [16, 8, 4, 0]


def test_cached_pictures_keep_their_sizes_and_captions(monkeypatch):
    table = datasets.Dataset.from_dict({"image": [picture(0, (16, 8))], "text": [["a", "b"]]})
    prepared = prepare_dataset(table, ImageSpec(3, 8, 8, random_flip=True), captioned=True)
    assert prepared._cache
    for seed in range(3):
        again = [prepared[0, seed] for _ in range(2)]
        assert again[0]["sizes"].tolist() == again[1]["sizes"].tolist() == [8, 16, 0, 4]
        assert again[0]["captions"] == again[1]["captions"]


# Identity


def test_other_captions_are_another_dataset():
    def identity(captions, stream=False, **options):
        table = datasets.Dataset.from_dict({"image": [picture()] * 40, "text": captions})
        return prepare_dataset(table.to_iterable_dataset() if stream else table, SPEC, **options).identity()

    same = ["a"] * 40
    for stream in (False, True):
        assert identity(same, stream, captioned=True) == identity(same, stream, caption_column="text")
        assert identity(same, stream, captioned=True) != identity(["b"] * 40, stream, captioned=True)
        assert identity(same, stream) == identity(["b"] * 40, stream) != identity(same, stream, captioned=True)
    assert identity(same, captioned=True) != identity([*"a" * 30, "b", *"a" * 9], captioned=True)


def test_identity_without_captions_is_a_digest_of_images_alone():
    images = torch.arange(12.0)[:, None, None, None].expand(12, 3, 8, 8).contiguous()
    expected = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert prepare_dataset(images, SPEC).identity() == {"rows": 12, "digest": expected}
