from __future__ import annotations

import nvlabs
import pytest
import torch
from diffusers import EDMEulerScheduler

from cm_diffusers.importing.edm import convert_network
from cm_diffusers.importing.unpickling import load_pickled_network
from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.preconditioning import Denoiser

CASES = {
    "unconditional": {},
    "class-conditional": {"label_dim": 6},
    "augmented": {"augment_dim": 9, "mult": (1, 1, 2), "num_blocks": 2, "attention": (8, 2)},
    "attention everywhere": {"attention": (4, 8), "label_dim": 3},
    "one channel, small heads": {"channels": 1, "head_dim": 32, "attention": ()},
}


@pytest.mark.parametrize("name", CASES)
def test_denoiser_equals_the_sources(name: str, tmp_path) -> None:
    config = CASES[name]
    source = nvlabs.build(**config)
    path = nvlabs.write_pickle(tmp_path / "edm.pkl", source)
    unet, scheduler = convert_network(load_pickled_network(path))
    assert type(scheduler) is EDMEulerScheduler
    assert unet.config.sample_size == 8

    sigma = torch.tensor([0.002, 0.5, 80.0])
    generator = torch.Generator().manual_seed(2)
    x = (
        torch.randn(3, config.get("channels", 3), 8, 8, generator=generator)
        * (0.25 + sigma[:, None, None, None] ** 2) ** 0.5
    )
    classes = torch.arange(3) % config["label_dim"] if "label_dim" in config else None
    one_hot = None if classes is None else torch.eye(config["label_dim"])[classes]
    with torch.no_grad():
        denoised = Denoiser(unet, read_preconditioning(scheduler))(x, sigma, class_labels=classes)
        output = unet(x, sigma.log() / 4, class_labels=classes).sample
        expected = source.model(x, sigma.log() / 4, one_hot)
    assert float((output - expected).abs().max()) < 1e-5
    assert float((denoised - source(x, sigma, one_hot)).abs().max()) < 1e-5


def read(network, tmp_path):
    return convert_network(load_pickled_network(nvlabs.write_pickle(tmp_path / "edm.pkl", network)))


def test_range_and_data_of_the_network_are_kept(tmp_path) -> None:
    network = nvlabs.build()
    network.sigma_min, network.sigma_max, network.sigma_data = 0.01, 50.0, 0.7
    _, scheduler = read(network, tmp_path)
    config = scheduler.config
    assert (config.sigma_min, config.sigma_max, config.sigma_data) == (0.01, 50.0, 0.7)


def test_range_without_ends_becomes_the_papers(tmp_path) -> None:
    _, scheduler = read(nvlabs.build(), tmp_path)
    assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (0.002, 80.0)


# What cannot be imported --------------------------------------------------------------------------------------------


def test_song_unet_is_refused_with_the_reason(tmp_path) -> None:
    with pytest.raises(ValueError, match="SongUNet cannot be imported, only DhariwalUNet: .*1 x 1 convolution"):
        read(nvlabs.build(model=nvlabs.SongUNet), tmp_path)


def test_other_preconditionings_are_refused_with_the_reason(tmp_path) -> None:
    with pytest.raises(ValueError, match="VPPrecond cannot be imported, only EDMPrecond: .*continuous time"):
        read(nvlabs.build(precond=nvlabs.VPPrecond), tmp_path)


def test_other_networks_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(ValueError, match="Linear cannot be imported, only EDMPrecond"):
        read(nvlabs.Linear(2, 2), tmp_path)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"skip_scale": 0.5}, "skip_scale=0.5"),
        ({"adaptive_scale": False}, "adaptive_scale=False"),
        ({"taps": (1, 3, 3, 1)}, "not with .1, 1."),
        ({"resample_proj": True}, "resample_proj=True.*1 x 1 convolution"),
        ({"eps": 1e-6}, r"normalisations.*differ: \(32, 1e-06\), \(32, 1e-05\)"),
        ({"width": 64}, r"normalisations.*differ: \(16, 1e-05\), \(32, 1e-05\)"),
    ],
)
def test_blocks_that_a_unet2dmodel_lacks_are_refused(block: dict, found: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=found):
        read(nvlabs.build(**block), tmp_path)


def test_heads_of_several_sizes_are_refused(tmp_path) -> None:
    network = nvlabs.build()
    network.model.dec["4x4_in0"].num_heads = 1
    with pytest.raises(ValueError, match="attention heads.*differ: 64, 256"):
        read(network, tmp_path)


def test_other_time_embedding_is_refused(tmp_path) -> None:
    network = nvlabs.build()
    network.model.map_noise.endpoint = True
    with pytest.raises(ValueError, match="time embedding .*True"):
        read(network, tmp_path)


def test_missing_parts_are_named(tmp_path) -> None:
    network = nvlabs.build()
    del network.sigma_data
    with pytest.raises(ValueError, match="EDMPrecond in the pickle has no attribute `sigma_data`"):
        read(network, tmp_path)
    del network.model.map_layer0
    with pytest.raises(ValueError, match="DhariwalUNet in the pickle has no module `map_layer0`, only map_noise"):
        read(network, tmp_path)
