"""Activations in eight bits: the same forward pass, nearly the same gradients, less memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from edge_agent import quantised_activations
from edge_agent.quantised_activations import quantised

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]


class Block(nn.Module):  # type: ignore[misc]
    """A layer with what layers are made of; its weights are frozen but for the first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trained = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.norm = nn.LayerNorm(width).requires_grad_(requires_grad=False)

    def forward(self, values: Any) -> Any:
        between = self.trained(values)
        self.between = weakref.ref(between)
        return self.norm(values + self.frozen(nn.functional.gelu(between)))


def gradients(blocks: nn.Sequential, values: Any, layers: Any) -> tuple[float, list[Any]]:
    blocks.zero_grad()
    with quantised(layers):
        # Not symmetric, or the norm at the end would leave no gradient.
        loss = blocks(values)[..., 0].square().mean()
        loss.backward()
    return float(loss.detach()), [
        value.grad.clone() for value in blocks.parameters() if value.requires_grad
    ]


def saved_bytes(blocks: nn.Sequential, values: Any, layers: Any, monkeypatch: Any) -> int:
    """Bytes kept for the backward pass, those of weights left out."""
    weights = {value.untyped_storage().data_ptr() for value in blocks.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def count(saved: Any) -> Any:
        for one in saved if isinstance(saved, tuple) else (saved,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in weights:
                sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
                held.append(one)
        return saved

    class Counted(quantised_activations._Rounding):
        def __call__(self, saved: Any) -> Any:
            return count(super().__call__(saved))

    with monkeypatch.context() as patch, saved_tensors_hooks(count, lambda saved: saved):
        patch.setattr(quantised_activations, "_Rounding", Counted)
        with quantised(layers):
            blocks(values)
    return sum(sizes.values())


@pytest.fixture
def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def test_the_loss_is_the_same_and_gradients_nearly(blocks: nn.Sequential) -> None:
    values = torch.randn(8, 10, 64)
    exact_loss, exact = gradients(blocks, values, [])
    loss, rounded = gradients(blocks, values, list(blocks))
    assert loss == exact_loss
    for one, other in zip(rounded, exact, strict=True):
        assert 0 < (one - other).norm() / other.norm() < 0.02


def test_less_is_saved_for_the_backward_pass(
    blocks: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(8, 10, 64)
    whole = saved_bytes(blocks, values, [], monkeypatch)
    two = saved_bytes(blocks, values, list(blocks)[:2], monkeypatch)
    all_of_it = saved_bytes(blocks, values, list(blocks), monkeypatch)
    assert all_of_it < two < whole
    assert all_of_it < 0.35 * whole


def test_what_was_rounded_is_given_up_when_the_forward_pass_is_over(
    blocks: nn.Sequential,
) -> None:
    with quantised(list(blocks)[:2]):
        loss = blocks(torch.randn(8, 10, 64)).sum()
    assert [block.between() is None for block in blocks] == [True, True, False]
    loss.backward()


def test_rows_of_zeros_and_half_precision_stay_what_they_are() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = torch.zeros(3, 32, dtype=dtype)
        values[1] = torch.linspace(-1e-4, 1e-4, 32)
        values[2] = torch.linspace(-300, 300, 32)
        back = quantised_activations._restored(quantised_activations._rounded(values))
        assert back.dtype == dtype
        largest = values.float().abs().amax(dim=-1, keepdim=True)
        assert (back.float() - values.float()).abs().le(largest / 120).all()


def test_layers_are_as_before_afterwards_even_after_an_error(blocks: nn.Sequential) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), quantised(list(blocks)):
        blocks(torch.randn(2, 3))
    assert all("forward" not in vars(block) for block in blocks)
    assert gradients(blocks, torch.ones(1, 2, 64), [])[0] > 0


PEAK = """
import re, sys, torch
from pathlib import Path
from edge_agent.peak_memory import give_back_at_once
from edge_agent.quantised_activations import quantised
from tests.edge_agent.test_quantised_activations import Block

def highest():
    # Not ru_maxrss: that begins with what the parent held.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
give_back_at_once()
blocks = torch.nn.Sequential(*(Block(256) for _ in range(12)))
values = torch.randn(32, 256, 256)
before = highest()
with quantised(blocks[: int(sys.argv[1])]):
    blocks(values).sum().backward()
print(highest() - before)
"""


def test_a_process_needs_less_memory_the_more_layers_are_quantised() -> None:
    def peak(layers: int) -> int:
        command = [sys.executable, "-c", PEAK, str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return int(done.stdout)

    none, half, all_of_them = peak(0), peak(6), peak(12)
    assert all_of_them < 0.5 * none
    assert all_of_them < half < 0.8 * none
