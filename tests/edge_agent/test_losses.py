"""The losses against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.dataset import IGNORED_LABEL, Tokenised
from edge_agent.losses import class_loss, log_prior, token_loss

pytestmark = pytest.mark.train

CLASSES = 4


def examples(labels: list[int]) -> list[Tokenised]:
    return [Tokenised({"input_ids": [1]}, [label]) for label in labels]


@given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12), st.integers(0, 99))
def test_the_balanced_loss_is_cross_entropy_weighed_by_local_frequencies(
    labels: list[int], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(len(labels), CLASSES))
    frequency = np.bincount(labels, minlength=CLASSES) / len(labels)
    weighed = frequency * np.exp(logits)
    expected = -np.mean(np.log(weighed[range(len(labels)), labels] / weighed.sum(axis=1)))

    prior = log_prior(examples(labels), CLASSES, loss="balanced")

    found = class_loss(torch.tensor(logits), torch.tensor(labels), prior)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_a_device_lacks_is_not_pushed_away() -> None:
    logits = torch.zeros(2, CLASSES, requires_grad=True)
    prior = log_prior(examples([0, 0, 2]), CLASSES, loss="balanced")

    class_loss(logits, torch.tensor([0, 2]), prior).backward()

    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, [1, 3]].any()
    assert logits.grad[:, [0, 2]].all()


def test_a_device_with_one_class_has_nothing_to_tell_apart() -> None:
    logits = torch.randn(3, CLASSES, requires_grad=True)
    prior = log_prior(examples([1, 1, 1]), CLASSES, loss="balanced")

    loss = class_loss(logits, torch.tensor([1, 1, 1]), prior)
    loss.backward()

    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_equal_frequencies_and_the_plain_loss_train_alike() -> None:
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3])
    even = log_prior(examples([0, 1, 2, 3]), CLASSES, loss="balanced")

    assert log_prior(examples([0]), CLASSES, loss="plain") is None
    torch.testing.assert_close(class_loss(logits, labels, even), class_loss(logits, labels, None))


def test_tokens_are_predicted_from_those_before_them() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 2] = 9.0  # after the first token, the second
    labels = torch.tensor([[4, 2, IGNORED_LABEL]])

    expected = math.log(1 + 4 * math.exp(-9.0))
    assert float(token_loss(logits, labels)) == pytest.approx(expected, abs=1e-6)
