"""The wrapper that `self.optimizers()` returns, and toggling."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from paceline.trainer.optimizer_handle import OptimizerHandle, bare, toggle_optimizer, untoggle_optimizer


def stepping(optimizer, closure, **kwargs):
    """A stepper that steps, as a strategy without a scaler does."""
    if closure is None:
        optimizer.step(**kwargs)
    else:
        optimizer.step(closure, **kwargs)
    return True


def skipping(optimizer, closure):
    """A stepper as under a scaler that saw gradients overflow."""
    return False


def handle_of(kind=SGD, stepper=stepping, **options):
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones_like(layer.weight)
    return OptimizerHandle(kind(layer.parameters(), **{"lr": 0.1, **options}), stepper)


class Gan(nn.Module):
    """Two parts, one shared parameter, one frozen; toggles as a `Module` does."""

    def __init__(self):
        super().__init__()
        self.g, self.d, self.shared = nn.Linear(1, 1), nn.Linear(1, 1), nn.Parameter(torch.ones(1))
        self.d.bias.requires_grad = False
        self.opt_g = SGD([*self.g.parameters(), self.shared], lr=0.1)
        self.opt_d = Adam([*self.d.parameters(), self.shared], lr=0.1)

    def toggle_optimizer(self, optimizer):
        toggle_optimizer(self, optimizer, [self.opt_g, self.opt_d])

    def untoggle_optimizer(self, optimizer):
        untoggle_optimizer(self, optimizer)

    def needed(self):
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


ALL = {"g.weight", "g.bias", "d.weight", "shared"}
ONLY_G = {"g.weight", "g.bias", "shared"}
ONLY_D = {"d.weight", "shared"}


# --- it is the optimizer -----------------------------------------------------------------------------------------
def test_a_handle_is_an_optimizer_of_the_wrapped_class():
    handle = handle_of(Adam)
    assert isinstance(handle, Optimizer)
    assert isinstance(handle, Adam)
    assert not isinstance(handle, SGD)
    assert handle.__class__.__name__ == "Adam"
    assert repr(handle) == repr(handle.optimizer)
    assert "zero_grad" in dir(handle)


def test_everything_but_step_is_the_wrapped_optimizers():
    handle = handle_of(momentum=0.9)
    real = handle.optimizer
    assert handle.param_groups is real.param_groups
    assert handle.state is real.state
    assert handle.defaults is real.defaults
    handle.step()
    handle.zero_grad()
    assert handle.param_groups[0]["params"][0].grad is None
    assert handle.state_dict() == real.state_dict()
    handle.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(real.param_groups) == 2
    with pytest.raises(AttributeError, match="'SGD' object has no attribute 'nothing'"):
        handle.nothing


def test_a_state_loaded_into_either_is_seen_in_both():
    handle = handle_of()
    state = handle.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    handle.optimizer.load_state_dict(state)
    assert handle.param_groups[0]["lr"] == 0.5
    state["param_groups"][0]["lr"] = 0.7
    handle.load_state_dict(state)
    assert handle.optimizer.param_groups[0]["lr"] == 0.7


def test_attributes_set_on_a_handle_are_the_optimizers():
    handle = handle_of()
    handle.note = "x"
    assert handle.optimizer.note == "x"
    del handle.note
    assert not hasattr(handle.optimizer, "note")


def test_bare_is_the_optimizer_of_a_handle_and_of_itself():
    handle = handle_of()
    assert bare(handle) is handle.optimizer
    assert bare(handle.optimizer) is handle.optimizer


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))])
def test_a_copied_handle_is_a_copied_optimizer(copied):
    handle = handle_of(Adam, lr=0.3)
    twin = copied(handle)
    assert type(twin) is Adam
    assert twin.param_groups[0]["lr"] == 0.3
    assert twin.param_groups[0]["params"][0] is not handle.param_groups[0]["params"][0]


# --- its step is the stepper's -----------------------------------------------------------------------------------
def test_step_goes_through_the_stepper_and_is_counted():
    handle = handle_of()
    before = handle.param_groups[0]["params"][0].detach().clone()
    assert handle.step() is None
    assert handle.stepped == 1
    torch.testing.assert_close(handle.param_groups[0]["params"][0], before - 0.1)


def test_a_step_that_the_stepper_skipped_is_not_counted():
    handle = handle_of(stepper=skipping)
    before = handle.param_groups[0]["params"][0].detach().clone()
    handle.step()
    assert handle.stepped == 0
    assert torch.equal(handle.param_groups[0]["params"][0], before)


def test_step_returns_what_its_closure_returned():
    handle = handle_of()
    assert handle.step(lambda: torch.tensor(3.0)) == 3
    assert handle.step(closure=lambda: 4.0) == 4


def test_step_returns_the_first_loss_of_several_as_lbfgs_does():
    x = nn.Parameter(torch.tensor([3.0]))
    handle = OptimizerHandle(LBFGS([x], lr=0.1, max_iter=5), stepping)
    losses = []

    def closure():
        handle.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert handle.step(closure).item() == 9.0
    assert len(losses) > 1
    assert handle.stepped == 1


def test_other_arguments_of_step_reach_the_optimizer():
    class Curious(SGD):
        def step(self, closure=None, *, factor=1):
            self.factor = factor
            return super().step(closure)

    handle = handle_of(Curious)
    handle.step(factor=3)
    assert handle.factor == 3


def test_a_scheduler_of_the_optimizer_sees_the_steps_of_its_handle():
    handle = handle_of()
    scheduler = StepLR(handle.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when the scheduler steps before the optimizer
        handle.step()
        scheduler.step()
    assert handle.stepped == 1
    assert handle.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_scheduler_may_be_made_with_a_handle():
    handle = handle_of()
    scheduler = StepLR(handle, 1)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert handle.step(lambda: 2.0) == 2.0
        scheduler.step()
    assert handle.stepped == 1
    assert handle.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# --- toggling ----------------------------------------------------------------------------------------------------
def test_toggling_leaves_gradients_only_to_one_optimizers_parameters():
    gan = Gan()
    gan.toggle_optimizer(gan.opt_g)
    assert gan.needed() == ONLY_G
    gan.untoggle_optimizer(gan.opt_g)
    assert gan.needed() == ALL
    gan.toggle_optimizer(OptimizerHandle(gan.opt_d, stepping))
    assert gan.needed() == ONLY_D
    gan.untoggle_optimizer(gan.opt_d)
    assert gan.needed() == ALL


def test_toggling_another_one_switches_to_it():
    gan = Gan()
    gan.toggle_optimizer(gan.opt_g)
    gan.toggle_optimizer(gan.opt_d)
    assert gan.needed() == ONLY_D
    gan.untoggle_optimizer(gan.opt_d)
    assert gan.needed() == ALL


def test_untoggling_without_toggling_changes_nothing():
    gan = Gan()
    gan.untoggle_optimizer(gan.opt_g)
    assert gan.needed() == ALL


def test_a_toggled_module_can_be_copied_and_untoggled():
    gan = Gan()
    gan.toggle_optimizer(gan.opt_g)
    twin = copy.deepcopy(gan)
    twin.untoggle_optimizer(twin.opt_g)
    assert (gan.needed(), twin.needed()) == (ONLY_G, ALL)


def test_toggle_model_toggles_inside_its_block_even_when_it_raises():
    gan = Gan()
    handle = OptimizerHandle(gan.opt_g, stepping, gan)
    with handle.toggle_model():
        assert gan.needed() == ONLY_G
    assert gan.needed() == ALL
    with pytest.raises(KeyError), handle.toggle_model(sync_grad=False):
        raise KeyError
    assert gan.needed() == ALL


def test_toggle_model_needs_the_module():
    with pytest.raises(RuntimeError, match=r"self\.optimizers\(\)"), handle_of().toggle_model():
        pass
