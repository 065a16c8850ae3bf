"""The penalty on last ranks, against NumPy and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.tail_penalty import TailPenalty
from wire_protocol.lora import TailRule

pytestmark = pytest.mark.train


def parameters(rank: int, *, zero_b: bool = False) -> dict[str, torch.Tensor]:
    """LoRA factors of two modules, in float64."""
    generator = torch.Generator().manual_seed(rank)
    made = {}
    for module in ("layers.0.query", "layers.0.value"):
        for name, shape in (("lora_A", (rank, 5)), ("lora_B", (4, rank))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values *= 0 if zero_b and name == "lora_B" else 1
            made[f"{module}.{name}"] = values.requires_grad_()
    return made


@given(st.integers(1, 12), st.floats(0.1, 0.99))
def test_the_penalty_is_that_of_the_paper(rank: int, share: float) -> None:
    held = parameters(rank)
    g = math.floor(share * rank)

    loss = TailPenalty(held, TailRule(share, 0.25)).added_to(torch.tensor(3.0))

    expected = sum(
        np.linalg.norm(held[f"layers.0.{module}.lora_B"].detach().numpy()[:, g:])
        * np.linalg.norm(held[f"layers.0.{module}.lora_A"].detach().numpy()[g:])
        for module in ("query", "value")
    )
    assert float(loss.detach()) == pytest.approx(3.0 + 0.25 * expected)


def test_its_gradient_pulls_the_tail_alone() -> None:
    held = parameters(10)

    TailPenalty(held, TailRule(0.8, 1.0)).added_to(torch.tensor(0.0)).backward()

    down = held["layers.0.query.lora_A"].grad
    assert down is not None
    assert not down[:8].any()
    assert (down[8:] != 0).all()


def test_a_fresh_adapter_whose_b_is_zero_gets_no_gradient_that_is_not_finite() -> None:
    held = parameters(4, zero_b=True)

    TailPenalty(held, TailRule(0.5, 1.0)).added_to(torch.tensor(0.0)).backward()

    for parameter in held.values():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("rule", [None, TailRule(0.9, 0.0)])
def test_without_a_rule_or_weight_the_loss_is_itself(rule: TailRule | None) -> None:
    loss = torch.tensor(1.0)

    assert TailPenalty(parameters(4), rule).added_to(loss) is loss


def test_a_factor_that_is_not_trained_is_not_penalised() -> None:
    only_b = {name: values for name, values in parameters(4).items() if name.endswith("B")}
    loss = torch.tensor(1.0)

    assert TailPenalty(only_b, TailRule(0.5, 1.0)).added_to(loss) is loss
