"""What a device says about the gradients of its layers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from edge_agent.gradient_sizes import GradientSizes

pytestmark = pytest.mark.train


def parameter(*gradient: float) -> torch.Tensor:
    value = torch.zeros(len(gradient), requires_grad=True)
    value.grad = torch.tensor(gradient)
    return value


def test_sizes_are_root_mean_squares_over_values_and_steps_from_low_to_high() -> None:
    upper, lower = parameter(3.0, 4.0), parameter(1.0)
    sizes = GradientSizes(
        {
            "layers.10.attention.q.lora_A": upper,
            "layers.9.attention.q.lora_A": lower,
            "layers.10.attention.q.lora_B": parameter(0.0, 0.0),
            "head.weight": parameter(100.0),
        }
    )
    assert sizes.per_value() is None
    sizes.add()
    assert sizes.per_value() == pytest.approx((1.0, 2.5))
    lower.grad = torch.tensor([7.0])
    sizes.add()
    assert sizes.per_value() == pytest.approx((5.0, 2.5))


def test_nothing_is_said_about_gradients_that_are_not_finite() -> None:
    for bad in (float("inf"), float("nan")):
        sizes = GradientSizes({"layers.0.attention.q.lora_A": parameter(1.0, bad)})
        sizes.add()
        assert sizes.per_value() is None
