from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from openai_unet import OpenAIUNet, randomise

from cm_diffusers.importing.architecture import read_architecture
from cm_diffusers.importing.openai import PUBLISHED_TRAITS, QKV_ORDERS, Traits, convert_unet, split_qkv

CASES = {
    "imagenet": {"num_classes": 5},
    "lsun": {"widths": (32, 32, 64), "num_blocks": 2, "attention": (False, False, True), "film": False},
    "legacy": {"order": "legacy", "head_dim": 8, "num_classes": 3},
    "attention everywhere": {
        "widths": (32, 64, 96),
        "attention": (True, True, True),
        "order": "legacy",
        "film": False,
    },
    "attention in the middle only": {"attention": (False, False), "num_blocks": 3},
    "convolutions resample": {"resblock_updown": False, "attention": (True, False), "num_classes": 2},
    "convolutions resample, attention below": {"resblock_updown": False, "film": False, "order": "legacy"},
    "one-dimensional projections": {"projection_dims": 1, "order": "legacy"},
    "one level, one channel": {"widths": (64,), "attention": (True,), "head_dim": 32, "channels": 1},
}


@pytest.fixture
def make_source() -> Callable[..., OpenAIUNet]:
    def make(**config: Any) -> Any:
        return randomise(OpenAIUNet(**config))

    return make


def traits_of(config: dict, size: int = 8) -> Traits:
    return Traits(size, config.get("head_dim", 16), config.get("order", "new"))


def inputs(config: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random images, times over the whole range, and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, config.get("channels", 3), 8, 8, generator=generator)
    time = torch.tensor([-1553.65, -3.5, 0.25, 1095.51])
    labels = torch.arange(4) % config["num_classes"] if "num_classes" in config else None
    return x, time, labels


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_sources(name: str) -> None:
    config = CASES[name]
    source = randomise(OpenAIUNet(**config))
    unet = convert_unet(source.state_dict(), traits_of(config))
    x, time, labels = inputs(config)
    with torch.no_grad():
        output = unet(x, time, class_labels=labels).sample
    expected = source(x, time, labels)
    assert float((output - expected).abs().max()) < 1e-5


def test_weights_in_half_precision_are_imported_in_full(make_source) -> None:
    source = make_source(attention=(True, False)).half().float()
    unet = convert_unet(source.half().state_dict(), traits_of({}))
    assert unet.dtype == torch.float32
    x, time, _ = inputs({})
    with torch.no_grad():
        torch.testing.assert_close(unet(x, time).sample, source.float()(x, time), atol=1e-5, rtol=0)


def test_unet_shares_no_memory_with_the_weights_and_saves(make_source, tmp_path) -> None:
    source = make_source()
    unet = convert_unet(source.state_dict(), traits_of({}))
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    for parameter in source.parameters():
        torch.nn.init.zeros_(parameter)
    x, time, _ = inputs({})
    with torch.no_grad():
        output = unet(x, time).sample
        assert torch.equal(output, loaded(x, time).sample)
    assert float(output.std()) > 0.1
    assert all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize("wrong", [{"qkv_order": "legacy"}, {"attention_head_dim": 32}, {"norm_eps": 0.1}])
def test_traits_matter(wrong: dict, make_source) -> None:
    """The comparison with the source would notice any of them."""
    source = make_source()
    unet = convert_unet(source.state_dict(), dataclasses.replace(traits_of({}), **wrong))
    x, time, _ = inputs({})
    with torch.no_grad():
        assert float((unet(x, time).sample - source(x, time)).abs().max()) > 1e-3


@pytest.mark.parametrize("order", QKV_ORDERS)
def test_queries_keys_and_values_are_told_apart(order: str) -> None:
    sizes = {"qkv": 3, "head": 4, "channel": 2}
    named = torch.stack(torch.meshgrid(*(torch.arange(sizes[axis]) for axis in QKV_ORDERS[order]), indexing="ij"))
    which, head, channel = (named[QKV_ORDERS[order].index(axis)].flatten() for axis in sizes)
    split = split_qkv(100 * which + 10 * head + channel, Traits(8, 2, order))
    expected = [[100 * q + 10 * h + c for h in range(4) for c in range(2)] for q in range(3)]
    assert split.tolist() == expected


def test_published_architectures_fit() -> None:
    """Sizes of the published files, in millions of parameters; on the meta device they cost nothing."""
    for architecture, traits in PUBLISHED_TRAITS.items():
        imagenet = traits.image_size == 64
        with torch.device("meta"):
            source = OpenAIUNet(
                architecture.widths, architecture.num_blocks, architecture.attention, traits.attention_head_dim,
                film=imagenet, num_classes=1000 if imagenet else None,
            )  # fmt: skip
        assert read_architecture(source.state_dict()) == architecture
        unet = convert_unet(source.state_dict(), traits)
        assert round(unet.num_parameters() / 1e6) == (296 if imagenet else 526)


# What cannot be imported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["time_embed.0.weight", "out.2.weight"])
def test_missing_layers_are_named(name: str, make_source) -> None:
    weights = make_source().state_dict()
    del weights[name]
    with pytest.raises(ValueError, match=f"`{name}` is missing"):
        convert_unet(weights, traits_of({}))


def test_incomplete_layers_are_named(make_source) -> None:
    weights = make_source().state_dict()
    del weights["middle_block.1.qkv.bias"]
    with pytest.raises(ValueError, match="mid_block.attentions.0.to_q.bias"):
        convert_unet(weights, traits_of({}))


def test_weights_of_another_shape_are_named(make_source) -> None:
    for name, shape in (("middle_block.1.qkv.weight", (100, 64, 1, 1)), ("out.0.bias", (7,))):
        weights = {**make_source().state_dict(), name: torch.ones(shape)}
        with pytest.raises(ValueError, match="do not fit a UNet2DModel of Architecture"):
            convert_unet(weights, traits_of({}))


def test_weights_without_a_place_are_named(make_source) -> None:
    weights = {**make_source().state_dict(), "encoder_pool.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="no place in a UNet2DModel: encoder_pool.weight"):
        convert_unet(weights, traits_of({}))


def test_predicted_variance_is_refused(make_source) -> None:
    weights = make_source().state_dict()
    weights["out.2.weight"], weights["out.2.bias"] = torch.ones(6, 32, 3, 3), torch.ones(6)
    with pytest.raises(ValueError, match="maps 3 channels to 6"):
        convert_unet(weights, traits_of({}))


def test_first_level_that_is_wider_than_the_first_convolution_is_refused(make_source) -> None:
    weights = make_source().state_dict()
    weights["input_blocks.0.0.weight"] = torch.ones(16, 3, 3, 3)
    with pytest.raises(ValueError, match="16, 32 and 32 channels"):
        convert_unet(weights, traits_of({}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv_order": "old"}, "new, legacy, interleaved, got 'old'"),
        ({"attention_head_dim": 48}, "attention_head_dim=48` does not divide 64"),
        ({"attention_head_dim": 0}, "attention_head_dim=0` does not divide"),
        ({"image_size": 9}, "multiple of 2 for 2 levels, got 9"),
    ],
)
def test_traits_that_do_not_fit_are_refused(wrong: dict, message: str, make_source) -> None:
    with pytest.raises(ValueError, match=message):
        convert_unet(make_source().state_dict(), dataclasses.replace(traits_of({}), **wrong))
