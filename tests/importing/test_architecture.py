from __future__ import annotations

import pytest
from conftest import build_unet
from openai_unet import OpenAIUNet

from cm_diffusers.importing.architecture import Architecture, parts, read_architecture


@pytest.mark.parametrize("resnet_resampling", [True, False])
@pytest.mark.parametrize("attention", [(False, False, True), (True, False, False), (True, True, True)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_architecture_is_read_back(num_blocks: int, attention: tuple, resnet_resampling: bool) -> None:
    source = OpenAIUNet((32, 32, 64), num_blocks, attention, resblock_updown=resnet_resampling)
    expected = Architecture((32, 32, 64), num_blocks, attention, resnet_resampling)
    assert read_architecture(source.state_dict()) == expected


def test_parts_have_places_of_their_own() -> None:
    found = list(parts(Architecture((32, 64), 2, (False, True), True)))
    assert len({part.source for part in found}) == len({part.target for part in found}) == len(found)


# What is refused ----------------------------------------------------------------------------------------------------


def test_other_layouts_are_refused() -> None:
    with pytest.raises(
        ValueError, match="not those of a U-Net in OpenAI's layout.*Found: conv_in.bias, conv_in.weight"
    ):
        read_architecture(build_unet().state_dict())


def test_resampling_without_weights_is_refused() -> None:
    weights = OpenAIUNet(resblock_updown=False).state_dict()
    weights = {name: value for name, value in weights.items() if ".op." not in name and "1.conv." not in name}
    with pytest.raises(ValueError, match="conv_resample=False"):
        read_architecture(weights)


def test_levels_that_differ_on_the_way_up_are_named() -> None:
    weights = OpenAIUNet().state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith("output_blocks.0.1.")}
    with pytest.raises(ValueError, match="output_blocks.0.1 is missing, expected attention"):
        read_architecture(weights)


def test_missing_convolution_is_named() -> None:
    weights = OpenAIUNet().state_dict()
    del weights["input_blocks.1.0.in_layers.2.weight"]
    with pytest.raises(ValueError, match="`input_blocks.1.0.in_layers.2.weight` is missing"):
        read_architecture(weights)
