import functools
import math

import pytest
import torch

from cm_diffusers.training.distances import build_distance, default_huber_c, l1, l2, pseudo_huber


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 4, 5, 5, generator=generator).unbind()[0], torch.rand(3, 4, 5, 5, generator=generator)


def test_l1_and_l2_are_means_over_each_sample(images):
    x, y = images
    for i in range(3):
        assert l1(x, y)[i] == pytest.approx(float((x[i] - y[i]).abs().mean()), rel=1e-6)
        assert l2(x, y)[i] == pytest.approx(float(((x[i] - y[i]) ** 2).mean()), rel=1e-6)


def test_pseudo_huber_takes_the_norm_of_the_whole_sample(images):
    x, y = (image.double() for image in images)
    c = 0.00054 * math.sqrt(100)
    expected = [math.sqrt(float((x[i] - y[i]).norm()) ** 2 + c**2) - c for i in range(3)]
    assert pseudo_huber(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert default_huber_c(100) == pytest.approx(c)


def test_pseudo_huber_is_exact_for_tiny_differences_in_float32():
    x = torch.zeros(1, 1, 1, 1)
    c = 1.0
    assert float(pseudo_huber(x + 1e-5, x, c)) == pytest.approx(0.5e-10, rel=1e-3)


@pytest.mark.parametrize("distance", [l1, l2, pseudo_huber])
def test_distance_to_itself_is_zero_with_a_finite_gradient(distance, images):
    x = images[0].clone().requires_grad_()
    value = distance(x, images[0]).sum()
    value.backward()
    assert value.item() == 0
    assert x.grad.isfinite().all()


def test_build_distance_passes_the_huber_constant(images):
    x, y = images
    built = build_distance("pseudo_huber", 0.7, (-1.0, 1.0), torch.device("cpu"))
    torch.testing.assert_close(built(x, y), pseudo_huber(x, y, 0.7))


class TestLPIPS:
    """Through the real library, with a backbone of random weights: the pretrained ones are a download."""

    @pytest.fixture(scope="class")
    def build(self):
        lpips = pytest.importorskip("lpips")
        patch = pytest.MonkeyPatch()
        patch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
        torch.manual_seed(0)
        yield functools.partial(build_distance, "lpips", None, device=torch.device("cpu"))
        patch.undo()

    def test_grey_and_rgb_images_of_any_size(self, build):
        distance = build(value_range=(-1.0, 1.0))
        x, y = torch.rand(2, 1, 8, 8) * 2 - 1, torch.rand(2, 1, 8, 8) * 2 - 1
        assert distance(x, y).shape == (2,)
        rgb = distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
        torch.testing.assert_close(distance(x, y), rgb)
        assert distance(x, x).abs().max() < 1e-6
        assert (distance(x, y) > 1e-4).all()

    def test_gradient_reaches_the_images_but_not_the_backbone(self, build):
        distance = build(value_range=(-1.0, 1.0))
        x = (torch.rand(1, 3, 8, 8) * 2 - 1).requires_grad_()
        distance(x, torch.zeros(1, 3, 8, 8)).sum().backward()
        assert x.grad.abs().sum() > 0
        assert all(p.grad is None for p in distance.parameters())

    def test_value_range_is_taken_into_account(self, build):
        distance = build(value_range=(0.0, 1.0))
        x, y = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
        expected = distance.network(
            *(torch.nn.functional.interpolate(i * 2 - 1, (224, 224), mode="bilinear") for i in (x, y))
        )
        torch.testing.assert_close(distance(x, y), expected.flatten())

    def test_other_numbers_of_channels_are_refused(self, build):
        with pytest.raises(ValueError, match="got 4 channels"):
            build(value_range=(-1.0, 1.0))(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
