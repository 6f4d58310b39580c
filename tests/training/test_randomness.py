"""Random numbers that depend on a seed and a place alone."""

import pytest
import torch

from cm_diffusers.training.randomness import SampleRandom, mixed, permutation, streams

CPU = torch.device("cpu")


def test_mixed_numbers_differ_for_neighbours_and_for_another_order():
    numbers = {mixed(*parts) for first in range(30) for second in range(30) for parts in [(first, second)]}
    numbers |= {mixed(single) for single in range(30)} | {mixed(first, 0, 0) for first in range(30)}
    assert len(numbers) == 900 + 30 + 30
    assert all(0 <= number < 2**63 for number in numbers)


def test_bits_of_mixed_numbers_are_even():
    numbers = torch.tensor([mixed(3, index) for index in range(20_000)])
    share = torch.stack([(numbers >> bit & 1).double().mean() for bit in range(63)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5


def test_a_permutation_holds_every_row_and_depends_on_all_its_numbers():
    first = permutation(100, 1, 2)
    assert sorted(first) == list(range(100))
    assert (first == permutation(100, 1, 2)).all()
    assert (first != permutation(100, 2, 1)).any()


def test_uniform_and_normal_numbers_have_their_moments():
    random = SampleRandom(torch.arange(40_000), CPU)
    uniform, normal = random.uniform(), random.normal_like(torch.zeros(40_000, 1, 2, 2))
    assert uniform.dtype == torch.float64 and 0 <= uniform.min() and uniform.max() < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.002)
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.var()) == pytest.approx(1, abs=0.02)
    # Neither one sample's numbers nor its neighbours' are alike.
    for one, other in ((normal[:-1], normal[1:]), (normal[..., 0], normal[..., 1])):
        assert abs(float((one * other).mean())) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([uniform, normal[:, 0, 0, 0].double()]))[0, 1])) < 0.02


def test_streams_are_those_of_splitmix64():
    # The first numbers of the published generator from the state 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = streams(torch.tensor([0, 1234567, -1]), 4)
    assert [number % 2**64 for number in found[1].tolist()] == expected
    assert found[0, 0].item() % 2**64 == 16294208416658607535
    assert torch.equal(streams(torch.tensor([-1]), 2), found[2:, :2])


def test_noise_is_normal_into_its_tails():
    noise = SampleRandom(torch.arange(1000), CPU).normal_like(torch.zeros(1000, 3, 11, 11)).double().flatten()
    assert noise.isfinite().all() and noise.abs().max() < 6.8
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = noise.pow(power).std() / len(noise) ** 0.5
        assert abs(noise.pow(power).mean() - expected) < 4 * spread
    levels = torch.tensor([-4.0, -3.0, -1.0, 0.0, 0.5, 2.0, 3.5], dtype=torch.float64)
    expected = torch.special.ndtr(levels)
    share = torch.stack([(noise < level).double().mean() for level in levels])
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / len(noise)).sqrt()).all()


def test_a_sample_has_the_same_numbers_in_any_batch_and_memory_format():
    images = torch.zeros(4, 3, 8, 8)
    whole = SampleRandom(torch.arange(4), CPU)
    positions, noise, more = whole.uniform(), whole.normal_like(images), whole.normal_like(images)
    part = SampleRandom(torch.tensor([2, 3]), CPU)
    assert torch.equal(part.uniform(), positions[2:])
    last = images[2:].contiguous(memory_format=torch.channels_last)
    drawn = part.normal_like(last)
    assert torch.equal(drawn, noise[2:]) and drawn.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(part.normal_like(images[2:]), more[2:]) and not torch.equal(more, noise)


def test_nothing_of_the_global_generators_is_used():
    before = torch.get_rng_state()
    random = SampleRandom(torch.arange(4), CPU)
    random.uniform(), random.normal_like(torch.zeros(4, 1, 2, 2))
    permutation(10, 1)
    assert torch.equal(before, torch.get_rng_state())
