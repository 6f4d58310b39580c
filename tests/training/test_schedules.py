import math

import pytest
import torch

from cm_diffusers.training import ConsistencyConfig
from cm_diffusers.training.ema import decay_for_half_life
from cm_diffusers.training.schedules import Rate, default_learning_rate, grid_length, make_levels, mu_schedule


def test_wider_networks_learn_at_a_lower_rate():
    rates = [default_learning_rate(channels) for channels in (8, 32, 256, 1024)]
    assert rates == pytest.approx([1e-3, 8e-4, 1e-4, 2.5e-5])


def test_learning_rate_warms_up_to_its_peak():
    rates = [Rate(1.0, 100, "constant", warmup_steps=4)(k) for k in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_learning_rate_schedules(schedule, half):
    assert Rate(1.0, 100, schedule)(0) == pytest.approx(1.0)
    assert Rate(1.0, 100, schedule)(50) == pytest.approx(half)
    end = Rate(1.0, 100, schedule)(100)
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)


def test_a_later_stage_goes_on_at_the_rate_of_the_earlier_one():
    whole = Rate(1.0, 100, "cosine", warmup_steps=5)
    assert [whole.after(40)(k) for k in range(61)] == [whole(40 + k) for k in range(61)]


def test_ct_follows_the_papers_curriculum():
    config = ConsistencyConfig(method="ct", max_train_steps=800_000, distance="l2").resolve()
    levels = make_levels(config, config.max_train_steps, 0.002, 80.0, 7.0)
    mu = mu_schedule(config)
    assert levels.num_levels(0) == 2
    assert levels.num_levels(800_000) == 151
    assert mu(0) == pytest.approx(0.9 ** (2 / 2))
    assert mu(800_000) == pytest.approx(0.9 ** (2 / 151))


def test_the_target_of_a_shorter_run_remembers_the_same_share_of_it():
    def steps_remembered(steps):
        config = ConsistencyConfig(method="ct", max_train_steps=steps, distance="l2").resolve()
        return -1 / math.log(mu_schedule(config)(steps))

    assert steps_remembered(800_000) == pytest.approx(steps_remembered(3_200_000)) == pytest.approx(716, rel=0.01)
    assert steps_remembered(8_000) == pytest.approx(7.16, rel=0.01)


def test_cd_keeps_its_levels_and_mu():
    config = ConsistencyConfig(num_levels=18, mu=0.5).resolve()
    levels = make_levels(config, config.max_train_steps, 0.002, 80.0, 7.0)
    assert {levels.num_levels(k) for k in (0, 7, 10**6)} == {18}
    assert mu_schedule(config)(123) == 0.5


def test_doubling_levels():
    config = ConsistencyConfig(levels="doubling", s0=10, s1=80, max_train_steps=400).resolve()
    levels = make_levels(config, config.max_train_steps, 0.002, 80.0, 7.0)
    assert [levels.num_levels(k) for k in (0, 99, 100, 200, 300, 400)] == [11, 11, 21, 41, 81, 81]


def test_mapped_levels_come_nearer_from_stage_to_stage_of_a_phase():
    config = ConsistencyConfig(method="ect", stages=4, max_train_steps=400).resolve()
    levels = make_levels(config, 200, 0.002, 80.0, 7.0)
    assert [levels.describe(k)["stage"] for k in (0, 49, 50, 199, 200)] == [0, 0, 1, 3, 3]


def test_a_truncated_stage_stays_as_near_as_the_first_ended():
    config = ConsistencyConfig(method="tcm", stages=4, truncation=0.7).resolve()
    levels = make_levels(config, 100, 0.002, 80.0, 7.0, is_truncated=True)
    assert {levels.describe(k)["stage"] for k in (0, 50, 100)} == {3}
    assert levels.at(0, torch.linspace(0, 0.999, 100).double()).sigma.min() == pytest.approx(0.7)


@pytest.mark.parametrize(("method", "length"), [("cd", 40), ("ct", 151), ("ict", 1281), ("ect", None), ("scd", None)])
def test_grid_length_is_that_of_the_end(method, length):
    assert grid_length(ConsistencyConfig(method=method).resolve()) == length


@pytest.mark.parametrize(("method", "steps"), [("ct", 5), ("ict", 3), ("ict", 7), ("ict", 2000)])
def test_a_grid_that_no_step_was_trained_on_is_not_the_one_of_the_end(method, steps):
    config = ConsistencyConfig(method=method, max_train_steps=steps).resolve()
    levels = make_levels(config, steps, 0.002, 80.0, 7.0)
    assert grid_length(config) == levels.num_levels(steps - 1)


def test_half_life_does_not_depend_on_the_batch_size():
    for batch in (32, 256):
        decay = decay_for_half_life(10_240, batch, 10**9, rampup=0.05)
        assert decay ** (10_240 / batch) == pytest.approx(0.5)


def test_rampup_limits_the_half_life_early_on():
    assert decay_for_half_life(1e9, 100, 1000, rampup=0.1) == pytest.approx(0.5)
    assert decay_for_half_life(1e9, 100, 1000, rampup=None) > 0.999999
