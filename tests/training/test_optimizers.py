"""Steps of the optimisers against torch's own, and steps that are left out."""

import pytest
import torch
from accelerate import Accelerator

from cm_diffusers import ConsistencyConfig
from cm_diffusers.training.optimizers import make_optimizer, set_learning_rate, take_step

REFERENCES = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def networks():
    for _ in range(2):
        torch.manual_seed(0)
        yield torch.nn.Linear(30, 20)


def give_gradients(network, seed):
    torch.manual_seed(seed)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_torch(name, weight_decay):
    config = ConsistencyConfig(optimizer=name, weight_decay=weight_decay, adam_betas=[0.9, 0.99])
    ours, theirs = networks()
    optimizer = make_optimizer(config, ours)
    reference = REFERENCES[name](theirs.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay)
    for step in range(50):
        rate = 1e-2 * (1 + step % 3)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        set_learning_rate(optimizer, config, rate, step)
        reference.param_groups[0]["lr"] = rate
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_step_that_is_left_out_changes_nothing(name):
    config = ConsistencyConfig(optimizer=name, weight_decay=0.1)
    network, _ = networks()
    optimizer = Accelerator(cpu=True).prepare(make_optimizer(config, network))
    before = []
    for step in range(12):
        give_gradients(network, step)
        bad = step == 8
        if bad:
            network.weight.grad[3, 3] = float("nan")
            state = optimizer.state[network.weight]
            before = [tensor.clone() for tensor in (network.weight, *state.values())]
        set_learning_rate(optimizer, config, 1e-2, step)
        take_step(optimizer, torch.tensor(bad))
        if bad:
            assert all(map(torch.equal, before, (network.weight, *state.values())))
    assert network.weight.isfinite().all()
    assert not torch.equal(network.weight, before[0])
