from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cm_diffusers import Known
from cm_diffusers.pipelines.known import LUMA_WEIGHTS, Luma, Patches, Pixels, luma, reflect, shrink

BASES = {"pixels": Pixels(), "luma": Luma(), "patches of 2": Patches(2), "patches of 4": Patches(4)}


def images(count: int = 2, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def orthogonal(first: Tensor) -> Tensor:
    """An orthogonal matrix whose first column is along a vector, by QR, as the published code makes it."""
    matrix = torch.eye(len(first), dtype=torch.float64)
    matrix[:, 0] = first / first.norm()
    q, _ = torch.linalg.qr(matrix)
    return -q if q[:, 0].sum() < 0 else q


@pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
def test_bases_keep_lengths_and_lead_back(basis):
    x = images()
    coefficients = basis.coefficients(x)
    torch.testing.assert_close(coefficients.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    torch.testing.assert_close(basis.images(coefficients), x, rtol=0, atol=1e-6)


def test_the_first_coefficients_are_luma_and_means():
    x = images()
    length = sum(weight**2 for weight in LUMA_WEIGHTS) ** 0.5
    torch.testing.assert_close(Luma().coefficients(x)[:, 0], luma(x)[:, 0] * sum(LUMA_WEIGHTS) / length)
    means = torch.nn.functional.avg_pool2d(x, 4)
    torch.testing.assert_close(Patches(4).coefficients(x)[:, :, 0], 4 * means)


def test_a_reflection_exchanges_two_axes():
    axis, first = (1.0, 2.0, -2.0), torch.eye(3)[:1]
    torch.testing.assert_close(reflect(first, axis, 1)[0], torch.tensor(axis) / 3)
    torch.testing.assert_close(reflect(reflect(first, axis, 1), axis, 1), first)


@pytest.mark.parametrize("edit", ["luma", "means"])
def test_what_is_put_back_is_what_the_published_change_of_basis_puts_back(edit):
    """Whatever completes the basis."""
    y, x = images(seed=1).double(), images(seed=2).double()
    if edit == "luma":
        q = orthogonal(torch.tensor(LUMA_WEIGHTS, dtype=torch.float64))
        kept = torch.diag(torch.tensor([1.0, 0, 0], dtype=torch.float64))
        mixing = q @ kept @ q.T
        expected = x + torch.einsum("cd,bdhw->bchw", mixing, y - x)
        known = Known.luma(luma(y))
    else:
        q = orthogonal(torch.ones(16, dtype=torch.float64))
        kept = torch.zeros(16, 16, dtype=torch.float64)
        kept[0, 0] = 1
        patches = lambda z: z.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # noqa: E731
        mixed = patches(x) + (patches(y) - patches(x)) @ (q @ kept @ q.T)
        expected = mixed.unflatten(4, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
        known = Known.patch_means(torch.nn.functional.avg_pool2d(y, 4), 4)
    torch.testing.assert_close(known.put_back(x), expected, rtol=0, atol=1e-6)


def test_all_known_is_the_image_and_nothing_known_is_the_other():
    y, x = images(seed=1), images(seed=2)
    for value, expected in ((True, y), (False, x)):
        for basis in BASES.values():
            known = Known(basis.coefficients(y), torch.tensor(value), basis)
            torch.testing.assert_close(known.put_back(x), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(known.start(), y if value else 0 * y, rtol=0, atol=1e-6)


def test_half_precision_is_not_that_of_the_basis():
    y, x = images(seed=1), images(seed=2)
    found = Known.luma(luma(y)).put_back(x.half())
    assert found.dtype == torch.float16
    assert float((luma(found.float()) - luma(y)).abs().max()) < 1e-3
    half = Known.luma(luma(y).half())
    kept = half.put_back(x)
    torch.testing.assert_close(Luma().coefficients(kept)[:, 0], half.coefficients[:, 0].float(), rtol=0, atol=1e-6)


def test_a_basis_with_tensors_goes_along():
    class Mixing:
        def __init__(self, device="cpu"):
            self.device = device

        def coefficients(self, images):
            return images

        images = coefficients

        def to(self, device):
            return Mixing(str(device))

    known = Known(images(), torch.tensor(True), Mixing())
    assert known.to("meta").basis.device == "meta" == known.to("meta").mask.device.type


@pytest.mark.parametrize("edit", ["luma", "means"])
def test_values_come_into_range_without_what_is_known(edit):
    y, x = images(seed=1), 3 * images(seed=2)
    known = Known.luma(luma(y)) if edit == "luma" else Known.patch_means(torch.nn.functional.avg_pool2d(y, 2), 2)
    found = known.put_back(x)
    assert found.abs().max() > 1.5
    shown = known.into_range(found, -1, 1)
    assert shown.abs().max() <= 1
    measure = luma if edit == "luma" else lambda z: torch.nn.functional.avg_pool2d(z, 2)
    torch.testing.assert_close(measure(shown), measure(y), rtol=0, atol=2e-6)


def test_what_is_in_range_stays():
    values = torch.tensor([[0.2, -0.4, 0.9], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(shrink(values, values.mean(1, keepdim=True), -1, 1, 1), values)
    too_far = torch.tensor([[2.0, -1.0, 0.5]])
    torch.testing.assert_close(shrink(too_far, torch.tensor([[0.5]]), -1, 1, 1), torch.tensor([[1.0, 0.0, 0.5]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Known(images(), torch.ones(2, 3, 8, 11, dtype=torch.bool)), "does not fit"),
        (lambda: Known(images(1), torch.ones(2, 3, 8, 12, dtype=torch.bool)), "does not fit"),
        (lambda: Known(images(), torch.ones(2, 3, 8, 12)), "booleans"),
        (lambda: Known((images() * 9).int(), torch.tensor(True)), "real or complex"),
        (lambda: Patches(5).coefficients(images()), "does not divide images of 8 x 12"),
        (lambda: Known.patch_means(images(), 1), "at least 2"),
        (lambda: Known.patch_means(images(), 2.0), "at least 2"),
    ],
)
def test_what_cannot_be_known_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
