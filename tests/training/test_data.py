import logging
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from cm_diffusers.training import data, images
from cm_diffusers.training.data import load_image_dataset, prepare_dataset
from cm_diffusers.training.images import BadImage, ImageSpec, ImageTransform, check_label, picture_to_tensor

RGB = ImageSpec(3, 8, 8)
GREY = ImageSpec(1, 8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of `datasets` is left behind, or found again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images._warn_of_enlarging.cache_clear()


def picture(value=0, size=(8, 8), mode="RGB"):
    """One colour, whose red (or grey) is `value`."""
    return Image.new(mode, size, (value, 0, 0) if mode == "RGB" else value)


def reds(prepared):
    """The red of each image of a dataset or batches, 0 to 255."""
    return [round((item["images"].reshape(-1)[0].item() + 1) * 127.5) for item in prepared]


@pytest.fixture
def folder(tmp_path):
    """`images/cat/0.png` to `5.png` with the reds 0 to 50, and `images/dog/0.png` to `5.png` with 100 to 150."""
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            picture(100 * label + 10 * i).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def table(folder):
    """The same as a dataset in memory."""
    return load_image_dataset(str(folder))


def corrupt(path):
    path.write_bytes(path.read_bytes()[:30])


# Loading


def test_a_folder_per_class_becomes_images_and_labels(folder):
    prepared = prepare_dataset(load_image_dataset(str(folder)), RGB, label_column="label", num_classes=2)
    items = [prepared[i] for i in range(len(prepared))]
    assert reds(items) == [0, 10, 20, 30, 40, 50, 100, 110, 120, 130, 140, 150]
    assert [item["class_labels"].item() for item in items] == [0] * 6 + [1] * 6
    assert items[0]["images"].dtype == torch.float32 and items[0]["class_labels"].dtype == torch.int64


def test_labels_are_left_out_unless_their_column_is_given(table):
    assert set(prepare_dataset(table, RGB)[0]) == {"images"}


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_file_and_folder_and_saved_folder_hold_the_same(tmp_path, table, streaming):
    (tmp_path / "parquet").mkdir()
    table = table.map(lambda row: row)  # writes the pictures' bytes
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "dict")
    for place in ("parquet/train.parquet", "parquet", "saved", "dict"):
        loaded = load_image_dataset(str(tmp_path / place), streaming=streaming)
        assert hasattr(loaded, "__len__") is not streaming
        assert reds(prepare_dataset(loaded, RGB))[:3] == [0, 10, 20]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_saved_splits_are_read(tmp_path, table, streaming):
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([7])).save_to_disk(tmp_path / "dict")
    load = lambda place, split: load_image_dataset(str(tmp_path / place), split=split, streaming=streaming)  # noqa: E731
    assert reds(prepare_dataset(load("saved", "train[:2]"), RGB)) == [0, 10]
    assert reds(prepare_dataset(load("dict", "train[1:3]+test"), RGB)) == [
        10,
        20,
        reds(prepare_dataset(table, RGB))[7],
    ]
    for wanted in ("test", "test[:2]", "train+test"):
        with pytest.raises(ValueError, match="has the splits train, and not test"):
            load("saved", wanted)
    with pytest.raises(ValueError, match="is empty"):
        load("saved", "train[:0]")
    with pytest.raises(ValueError, match="pct1_dropremainder"):
        load("saved", "train[:33%](pct1_dropremainder)")


def test_saved_splits_keep_their_names(tmp_path, table):
    datasets.DatasetDict({"my-split": table}).save_to_disk(tmp_path / "dict")
    assert len(load_image_dataset(str(tmp_path / "dict"), split="my-split")) == len(table)
    rows = datasets.Dataset.from_dict({"image": table["image"][:3]}, split="test")
    rows.save_to_disk(tmp_path / "saved")
    assert len(load_image_dataset(str(tmp_path / "saved"), split="test")) == 3
    assert len(load_image_dataset(str(tmp_path / "saved"))) == 3


@pytest.mark.parametrize("options", [{"name": "small"}, {"data_files": "other.parquet"}], ids=["name", "files"])
def test_what_is_one_by_itself_has_no_configurations_and_files(tmp_path, table, options):
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "one.parquet")
    for place in ("saved", "one.parquet"):
        with pytest.raises(ValueError, match="neither configurations nor `data_files`"):
            load_image_dataset(str(tmp_path / place), **options)


def test_data_files_choose_what_is_read(tmp_path, table):
    table.select([4]).to_parquet(tmp_path / "one.parquet")
    loaded = load_image_dataset("parquet", data_files=str(tmp_path / "one.parquet"))
    assert reds(prepare_dataset(loaded, RGB)) == [40]


def test_json_file_names_its_pictures(tmp_path, folder):
    (tmp_path / "list.jsonl").write_text(f'{{"image": "{folder}/cat/3.png"}}\n')
    assert reds(prepare_dataset(load_image_dataset(str(tmp_path / "list.jsonl")), RGB)) == [30]


def test_what_is_not_found_says_what_was_tried(tmp_path, table, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.*no file or folder"):
        load_image_dataset(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt.*\.parquet, \.arrow"):
        load_image_dataset(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="'tset'.*a folder"):
        load_image_dataset(str(tmp_path / "images"), split="tset")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match="'train'.*save_to_disk.*has the splits test"):
        load_image_dataset(str(tmp_path / "dict"))

    def absent(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(ValueError, match="'me/absent'.*Hub, as no file or folder"):
        load_image_dataset("me/absent")


def test_empty_split_is_refused(tmp_path, table, monkeypatch):
    table.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="'train'.*no data"):
        load_image_dataset(str(tmp_path / "empty.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table.select([]))
    with pytest.raises(ValueError, match="'train'.*is empty"):
        load_image_dataset("me/empty")


# Columns


def test_missing_column_names_the_nearest(table):
    with pytest.raises(ValueError, match="'imgae'; it has image, label. Did you mean 'image'"):
        prepare_dataset(table, RGB, image_column="imgae")
    with pytest.raises(ValueError, match="label column 'lable'.*'label'"):
        prepare_dataset(table, RGB, label_column="lable")


def test_columns_with_no_or_two_images_must_be_told(table):
    with pytest.raises(ValueError, match="image_column.*none"):
        prepare_dataset(table.select_columns(["label"]), RGB)
    twice = table.add_column("photo", [None] * 12).cast_column("photo", datasets.Image())
    with pytest.raises(ValueError, match="image_column.*image, photo"):
        prepare_dataset(twice, RGB)


def test_the_only_image_feature_is_found_whatever_its_name(table):
    assert reds([prepare_dataset(table.rename_column("image", "x_ray"), RGB)[2]]) == [20]


def test_users_format_does_not_matter_and_their_transform_does(table):
    assert reds([prepare_dataset(table.with_format("torch"), RGB)[1]]) == [10]
    own = table.with_transform(lambda rows: {"images": [torch.ones(3, 8, 8) for _ in rows["image"]]})
    assert reds([prepare_dataset(own, RGB)[1]]) == [255]


@pytest.mark.parametrize("label", [2, -1])
def test_label_out_of_range_is_found_before_training(table, label):
    broken = table.remove_columns("label").add_column("label", [0] * 11 + [label])
    with pytest.raises(ValueError, match=f"row 11, column 'label' is {label}; the network knows 0 to 1"):
        prepare_dataset(broken, RGB, label_column="label", num_classes=2)


def test_labels_must_be_whole_numbers():
    assert check_label(torch.tensor(3), None, "it") == check_label(np.int32(3), 4, "it") == 3
    with pytest.raises(ValueError, match="'cat'.*class_encode_column"):
        check_label("cat", None, "it")
    with pytest.raises(ValueError, match=r"whole number, got 1\.5"):
        check_label(1.5, None, "it")


def test_class_conditional_network_needs_labels(table):
    with pytest.raises(ValueError, match="class-conditional: set `label_column`"):
        prepare_dataset(table, RGB, num_classes=2)
    with pytest.raises(ValueError, match="row 0 has no label"):
        prepare_dataset(torch.zeros(4, 3, 8, 8), RGB, num_classes=2)


# One picture


@pytest.mark.parametrize("low_high", [(-1.0, 1.0), (0.0, 1.0), (-0.3, 0.7)])
def test_black_and_white_are_the_ends_of_the_range(low_high):
    spec = ImageSpec(1, 1, 2, low_high)
    pair = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    assert torch.equal(picture_to_tensor(pair, spec).flatten(), torch.tensor(low_high))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_mode_becomes_the_networks_channels(mode, channels):
    white = {"LA": (255, 255), "P": 255, "PA": (255, 255), "CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128)}
    white |= {"HSV": (0, 0, 255), "I": 65535, "I;16": 65535}
    image = Image.new(mode, (8, 8), white.get(mode, "white"))
    if mode in ("P", "PA"):
        image.putpalette([0] * 765 + [255] * 3)
    images = prepare_dataset([image], ImageSpec(channels, 8, 8))[0]["images"]
    assert torch.equal(images, torch.ones(channels, 8, 8))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.array([[0, 255, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    images = prepare_dataset([str(tmp_path / "deep.png")], ImageSpec(1, 1, 5, (0.0, 255.0)))[0]["images"]
    assert images.flatten().tolist() == [0, 1, 1, 128, 255]


def test_dark_sixteen_bit_picture_stays_dark():
    dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))
    assert reds(prepare_dataset([dark], GREY)) == [1]


def test_transparency_lies_on_white_unless_the_network_has_it():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(prepare_dataset([clear], RGB)[0]["images"], torch.ones(3, 8, 8))
    assert prepare_dataset([clear], ImageSpec(4, 8, 8))[0]["images"][:, 0, 0].tolist() == [1, -1, -1, -1]


def test_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "palette.png", transparency=0)
    assert reds(prepare_dataset([str(tmp_path / "palette.png")], RGB)) == [255]


def test_rotation_tag_is_followed(tmp_path):
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.jpg", exif=exif)
    images = prepare_dataset([str(tmp_path / "turned.jpg")], ImageSpec(1, 16, 16))[0]["images"]
    assert images[0, 0].max() < -0.9 and images[0, -1].min() > 0.9


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_centre_of_a_long_picture_is_kept(size):
    image = Image.new("L", size)
    width, height = size
    image.paste(255, ((width - 8) // 2, (height - 8) // 2, (width + 8) // 2, (height + 8) // 2))
    assert torch.equal(picture_to_tensor(image, GREY), torch.ones(1, 8, 8))


@pytest.mark.parametrize("size", [(17, 31), (100, 33), (8, 9), (5, 64), (3, 3)])
def test_any_size_covers_the_networks(size):
    assert picture_to_tensor(picture(255, size, "L"), ImageSpec(1, 8, 12)).eq(1).all()


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert picture_to_tensor(Image.fromarray(stripes), GREY)[:, :, 1:-1].abs().max() < 0.02


def test_enlarging_is_said_once(caplog):
    for _ in range(2):
        picture_to_tensor(picture(0, (4, 4)), RGB)
    assert [record.message[:27] for record in caplog.records] == ["Images smaller than 8 x 8 a"]


def test_random_crops_are_parts_of_the_picture_and_reach_its_ends():
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (8, 1)))
    prepared = prepare_dataset([ramp], ImageSpec(1, 8, 8, (0.0, 255.0), center_crop=False))
    torch.manual_seed(0)
    crops = [prepared[0]["images"] for _ in range(100)]
    starts = {crop[0, 0, 0].item() for crop in crops}
    assert starts == set(range(9))
    assert all(torch.equal(crop[0, 0] - crop[0, 0, 0], torch.arange(8.0)) for crop in crops)


@pytest.mark.parametrize("tensors", [False, True])
def test_half_of_the_images_are_mirrored(tensors):
    ramp = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    source = torch.from_numpy(ramp).float()[None, None] if tensors else [Image.fromarray(ramp)]
    prepared = prepare_dataset(source, ImageSpec(1, 8, 8, (0.0, 255.0), random_flip=True))
    torch.manual_seed(0)
    rows = [tuple(prepared[0]["images"][0, 3].tolist()) for _ in range(200)]
    plain, mirrored = tuple(range(8)), tuple(reversed(range(8)))
    assert set(rows) == {plain, mirrored} and 70 < rows.count(mirrored) < 130


def test_augmentation_follows_the_given_or_the_global_generator():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8))
    transform = ImageTransform(ImageSpec(3, 8, 16, center_crop=False, random_flip=True))
    own = [transform(noise, torch.Generator().manual_seed(5))["images"] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(own[0], own[1]) and torch.equal(own[0], transform(noise)["images"])


def test_preparing_leaves_the_global_generator_alone(table):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prepare_dataset(table, ImageSpec(3, 6, 6, center_crop=False, random_flip=True))
    assert torch.equal(before, torch.get_rng_state())


# Bad images


def test_corrupt_image_is_named(folder):
    corrupt(folder / "cat" / "3.png")
    prepared = prepare_dataset(load_image_dataset(str(folder)), RGB)
    assert len(prepared) == 12
    with pytest.raises(ValueError, match=r"row 3, column 'image' \(.*cat/3\.png\) cannot be read"):
        prepared[3]


def test_corrupt_first_image_is_found_at_once(folder):
    corrupt(folder / "cat" / "0.png")
    with pytest.raises(ValueError, match="cat/0.png"):
        prepare_dataset(load_image_dataset(str(folder)), RGB)


@pytest.mark.parametrize("cache", [0, 2**30])
def test_skipped_image_is_named_once_and_replaced_by_the_next(folder, caplog, monkeypatch, cache):
    monkeypatch.setattr(data, "CACHE_BYTES", cache)
    for name in ("cat/2", "cat/3", "dog/5"):
        corrupt(folder / f"{name}.png")
    prepared = prepare_dataset(load_image_dataset(str(folder)), RGB, on_bad_image="skip")
    for _ in range(2):
        assert reds(prepared[i] for i in range(12)) == [0, 10, 40, 40, 40, 50, 100, 110, 120, 130, 140, 0]
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(named) == 3 and "cat/2.png" in named[0] and "cat/3.png" in named[1] and "dog/5.png" in named[2]


def test_skipped_image_is_left_out_of_a_stream(folder, caplog):
    corrupt(folder / "cat" / "0.png")
    corrupt(folder / "dog" / "1.png")
    stream = load_image_dataset(str(folder), streaming=True)
    prepared = prepare_dataset(stream, RGB, on_bad_image="skip")
    for _ in range(2):
        assert reds(prepared) == [10, 20, 30, 40, 50, 100, 120, 130, 140, 150]
    assert sum("cat/0.png" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ValueError, match="cat/0.png"):
        prepare_dataset(stream, RGB)


def test_iterating_ends_after_the_last_image(table):
    prepared = prepare_dataset(table, RGB)
    assert len(list(prepared)) == 12 and torch.equal(prepared[-1]["images"], prepared[11]["images"])
    with pytest.raises(IndexError, match="12 images; there is no row 12"):
        prepared[12]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_bad_images_are_an_error(folder, streaming):
    for path in folder.rglob("*.png"):
        corrupt(path)
    with pytest.raises(ValueError, match="can be read"):
        prepare_dataset(load_image_dataset(str(folder), streaming=streaming), RGB, on_bad_image="skip")


def test_search_for_a_good_image_is_bounded(monkeypatch):
    monkeypatch.setattr(data, "MOST_BAD_IN_A_ROW", 3)
    bad = [b"bad"] * 4
    with pytest.raises(ValueError, match="None of the 3 images from row 0 on"):
        prepare_dataset([*bad, picture()], RGB, on_bad_image="skip")
    with pytest.raises(ValueError, match="None of 3 images in a row"):
        prepare_dataset(Stream([*bad, picture()]), RGB, on_bad_image="skip")


def test_missing_and_unscaled_images_are_bad():
    with pytest.raises(ValueError, match="row 0 cannot be read: it is a NoneType"):
        prepare_dataset([None], RGB)
    with pytest.raises(ValueError, match="floats in no known range"):
        prepare_dataset([Image.new("F", (8, 8))], RGB)
    with pytest.raises(ValueError, match="array of float64; expected integers from 0 to 255"):
        prepare_dataset([np.zeros((8, 8, 3))], RGB)
    with pytest.raises(ValueError, match="`on_bad_image` must be 'error' or 'skip', got 'ignore'"):
        prepare_dataset([picture()], RGB, on_bad_image="ignore")


# Tensors and torch datasets


class Stream(torch.utils.data.IterableDataset):
    """A stream that can be read as often as one likes."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class ReadOnce(Stream):
    """A stream that can be read only once."""

    def __init__(self, items):
        self.stream = iter(items)

    def __iter__(self):
        return self.stream


@pytest.mark.parametrize("count", [3, 20])
def test_the_first_of_what_can_be_read_once_are_not_lost(count):
    """Fewer than are looked at when it is prepared, and more."""
    images = torch.rand(24, 3, 8, 8) * 2 - 1
    stream = prepare_dataset(ReadOnce(images), RGB)
    for _ in range(2):
        assert torch.equal(torch.stack([item["images"] for item in stream.first(count)]), images[:count])
    assert torch.equal(torch.stack([item["images"] for item in stream]), images)


def ramp(low, high):
    return torch.linspace(low, high, 192).view(1, 3, 8, 8)


@pytest.mark.parametrize("source", [ramp(0, 255), TensorDataset(ramp(0, 255))], ids=["tensor", "dataset"])
def test_floats_of_bytes_are_refused(source):
    with pytest.raises(ValueError, match="go from 0 to 255; the network's lie in .-1, 1."):
        prepare_dataset(source, RGB)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (ramp(-4, 4), "clipped"), (ramp(-2, 0), "clipped"), (ramp(0, 1), "black -1"), (ramp(-1.1, 1.1), ""),
        (torch.zeros(1, 3, 8, 8), ""),
    ],
)  # fmt: skip
def test_floats_out_of_range_are_told(images, told, caplog):
    prepare_dataset(images, RGB)
    assert told in caplog.text and bool(told) == bool(caplog.text)


@pytest.mark.parametrize("kind", [list, Stream, ReadOnce])
@pytest.mark.parametrize("form", [lambda image: image, lambda image: {"image": image}], ids=["image", "dict"])
def test_floats_of_other_datasets_are_looked_at_too(kind, form, caplog):
    with pytest.raises(ValueError, match="from 0 to 255; the network's lie in"):
        prepare_dataset(kind([form(image) for image in ramp(0, 255)]), RGB)
    prepare_dataset(kind([form(image) for image in ramp(0, 1)]), RGB)
    assert "Is black -1?" in caplog.text
    caplog.clear()
    images = [form(image) for image in [*ramp(-1, 1), *ramp(-1, 1)]]
    prepared = prepare_dataset(kind(images), RGB)
    assert not caplog.text and len(list(prepared)) == len(images)


def test_floats_of_formatted_tables_are_looked_at_too():
    pixels = ramp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    table.set_transform(
        lambda rows: {"image": [torch.from_numpy(np.array(i)).movedim(-1, 0).float() for i in rows["image"]]}
    )
    with pytest.raises(ValueError, match="Scale them to that"):
        prepare_dataset(table, RGB)


def test_colours_that_pil_does_not_know_are_a_bad_image(caplog):
    with pytest.raises(BadImage, match="row 0 cannot be read.*LAB"):
        prepare_dataset([Image.new("LAB", (8, 8))], GREY)
    prepared = prepare_dataset([Image.new("LAB", (8, 8)), picture(30, mode="L")], GREY, on_bad_image="skip")
    assert reds(prepared) == [30, 30] and "It is skipped" in caplog.text


def test_floats_in_the_range_of_another_network_are_fine(caplog):
    prepare_dataset(ramp(0, 1), ImageSpec(3, 8, 8, (0.0, 1.0)))
    assert not caplog.text


def test_no_finite_image_is_the_error_that_it_was():
    with pytest.raises(ValueError, match="None of the 1 images"):
        prepare_dataset(torch.full((1, 3, 8, 8), math.nan), RGB, on_bad_image="skip")


@pytest.mark.parametrize("source", ["a/folder", {"train": [1], "test": [2]}], ids=str)
def test_what_is_no_dataset_is_refused_by_type(source):
    with pytest.raises(TypeError, match="a/folder|train, test"):
        prepare_dataset(source, RGB)


def test_arrays_may_have_one_channel_and_else_are_refused_by_their_shape():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    prepared = [prepare_dataset([{"image": image}], GREY)[0]["images"] for image in (grey, grey[..., None])]
    assert torch.equal(*prepared)
    with pytest.raises(ValueError, match="row 0.*\\(3, 8, 8\\)"):
        prepare_dataset([{"image": np.zeros((3, 8, 8), np.uint8)}], RGB)


def test_tensors_come_out_as_they_are(generator):
    images = torch.randn(5, 2, 8, 8, generator=generator)
    prepared = prepare_dataset(images, ImageSpec(2, 8, 8))
    assert len(prepared) == 5 and all(torch.equal(prepared[i]["images"], images[i]) for i in range(5))


@pytest.mark.parametrize(
    "item",
    [
        (torch.ones(3, 8, 8), 1),
        {"images": torch.ones(3, 8, 8), "class_labels": torch.tensor(1)},
        {"image": Image.new("RGB", (8, 8), "white"), "label": 1},
        (np.full((8, 8, 3), 255, dtype=np.uint8), np.int64(1)),
    ],
)
@pytest.mark.parametrize("kind", [list, Stream])
def test_pairs_and_dicts_give_images_and_labels(item, kind):
    found = next(iter(prepare_dataset(kind([item] * 2), RGB, num_classes=2)))
    assert torch.equal(found["images"], torch.ones(3, 8, 8)) and found["class_labels"].item() == 1


def test_labels_of_a_torch_dataset_are_shown_if_they_are_labels():
    images = torch.zeros(2, 3, 8, 8)
    assert prepare_dataset(TensorDataset(images, torch.tensor([3, 1])), RGB)[1]["class_labels"] == 1
    assert set(prepare_dataset(TensorDataset(images, torch.zeros(2, 4)), RGB)[0]) == {"images"}


def test_first_item_of_a_stream_is_not_lost():
    items = [picture(value) for value in (10, 20, 30)]
    assert reds(prepare_dataset(ReadOnce(items), RGB)) == [10, 20, 30]
    assert reds(prepare_dataset(ReadOnce([b"bad", *items]), RGB, on_bad_image="skip")) == [10, 20, 30]
    often = prepare_dataset(Stream(items), RGB)
    assert reds(often) == reds(often) == [10, 20, 30]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_is_named(value):
    images = torch.zeros(4, 3, 8, 8)
    images[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match="row 2 holds values that are not finite"):
        prepare_dataset(images, RGB)[2]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 9), (4, 8, 8), (3, 16, 16)])
def test_tensor_of_another_shape_is_refused_with_both(shape):
    with pytest.raises(ValueError, match=rf"row 0 has the shape \({shape[0]}, {shape[1]}, {shape[2]}\).*\(3, 8, 8\)"):
        prepare_dataset(torch.zeros(2, *shape), RGB, on_bad_image="skip")


def test_other_input_is_refused():
    with pytest.raises(ValueError, match=r"\(n, channels, height, width\), got \(3, 8, 8\)"):
        prepare_dataset(torch.zeros(3, 8, 8), RGB)
    with pytest.raises(ValueError, match="torch.uint8; expected floats"):
        prepare_dataset(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), RGB)
    with pytest.raises(ValueError, match="network of 2 channels takes tensors"):
        prepare_dataset([picture()], ImageSpec(2, 8, 8))
    with pytest.raises(ValueError, match="must hold one of images.*row 0 holds pixels"):
        prepare_dataset([{"pixels": 1}], RGB)
    with pytest.raises(TypeError, match="got int"):
        prepare_dataset(3, RGB)


def test_empty_dataset_is_refused(table):
    never = table.to_iterable_dataset().filter(lambda row: False)
    for empty in (torch.zeros(0, 3, 8, 8), [], table.select([]), Stream([]), never):
        with pytest.raises(ValueError, match="empty"):
            prepare_dataset(empty, RGB)


def test_spec_is_checked():
    with pytest.raises(ValueError, match="`height` must be at least 1, got 0"):
        ImageSpec(3, 0, 8)
    with pytest.raises(ValueError, match=r"`value_range`.*\(1, 0\)"):
        ImageSpec(3, 8, 8, (1, 0))


# Cache and identity


def test_small_pictures_are_decoded_once(table, monkeypatch):
    opened = []
    real = images._open
    monkeypatch.setattr(images, "_open", lambda image, name: opened.append(name) or real(image, name))
    prepared = prepare_dataset(table, RGB)
    assert reds(prepared[i] for i in (1, 1, 2, 1)) == [10, 10, 20, 10]
    assert len(opened) == 3  # with the check of the first
    monkeypatch.setattr(data, "CACHE_BYTES", 12 * 3 * 8 * 8 * 4 - 1)
    large = prepare_dataset(table, RGB)
    opened.clear()
    assert reds(large[i] for i in (1, 1)) == [10, 10] and len(opened) == 2


def test_what_a_transform_of_the_users_gives_is_not_kept(table):
    made = iter(range(100))
    changing = table.with_transform(lambda rows: {"image": [picture(next(made)) for _ in rows["image"]]})
    prepared = prepare_dataset(changing, RGB)
    assert reds(prepared[1] for _ in range(3)) == [1, 2, 3]
    assert prepared.identity() == {"rows": 12}


def test_identity_tells_datasets_apart(table):
    def identity(source):
        return prepare_dataset(source, RGB).identity()

    images = torch.arange(20.0)[:, None, None, None].expand(20, 3, 8, 8)
    same = [identity(source) for source in (table, table.select(range(12)), images, images.clone())]
    assert same[0] == same[1] != same[2] == same[3]
    assert identity(table.select(range(11))) != same[0]
    assert identity(table.select([1, 0, *range(2, 12)])) != same[0]
    assert identity(images + 1) != same[2]
    streams = [identity(table.to_iterable_dataset(num_shards=shards)) for shards in (2, 2, 3)]
    assert streams[0] == streams[1] != streams[2]
    assert identity(table.select(range(1, 12)).to_iterable_dataset(num_shards=2)) != streams[0]
    assert identity(ReadOnce([picture(1), picture(2)])) == {"shards": None}
