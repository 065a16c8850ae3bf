from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_server.partition import PartitionOptions, Rows, split_by_label
from wire_protocol.errors import ConfigError

LABELS = ["a", "b", "c", "d"]


def split(labels: list[str], options: PartitionOptions, seed: int = 0) -> list[Rows]:
    return split_by_label(labels, options, generator=np.random.default_rng(seed))


@settings(deadline=None)
@given(
    labels=st.lists(st.sampled_from(LABELS), max_size=200),
    devices=st.integers(1, 12),
    alpha=st.floats(1e-6, 1e6),
    quantity_alpha=st.none() | st.floats(1e-3, 1e3),
    minimum=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_every_row_goes_to_exactly_one_device_and_nobody_stays_below_the_minimum(
    labels: list[str],
    devices: int,
    alpha: float,
    quantity_alpha: float | None,
    minimum: int,
    seed: int,
) -> None:
    options = PartitionOptions(devices, alpha, quantity_alpha, minimum)
    if len(labels) < devices * minimum:
        with pytest.raises(ConfigError, match="cannot give"):
            split(labels, options, seed)
        return

    parts = split(labels, options, seed)

    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(len(part) >= minimum for part in parts)


def test_equal_seeds_give_equal_splits_and_other_seeds_others() -> None:
    labels = LABELS * 50
    options = PartitionOptions(5, alpha=0.5)

    first, again, other = (
        [part.tolist() for part in split(labels, options, seed)] for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


def test_a_large_alpha_gives_every_device_nearly_the_same_mix() -> None:
    labels = LABELS * 100
    for part in split(labels, PartitionOptions(4, alpha=1e7)):
        mix = [sum(labels[row] == label for row in part) for label in LABELS]
        assert all(abs(count - 25) <= 1 for count in mix)


def test_a_small_alpha_gives_devices_that_see_few_labels() -> None:
    labels = LABELS * 100
    shares = [
        max(sum(labels[row] == label for row in part) for label in LABELS) / len(part)
        for part in split(labels, PartitionOptions(4, alpha=0.05))
    ]
    assert np.mean(shares) > 0.7


def test_quantity_skew_changes_sizes_but_not_the_mix() -> None:
    labels = LABELS * 500
    parts = split(labels, PartitionOptions(4, alpha=1e7, quantity_alpha=1.0))

    sizes = [len(part) for part in parts]
    assert max(sizes) > 2 * min(sizes)
    for part in parts:
        mix = [sum(labels[row] == label for row in part) for label in LABELS]
        assert max(mix) - min(mix) <= 3


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha must be a positive number"):
        PartitionOptions(2, alpha)


def test_no_device_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one device"):
        PartitionOptions(0, 1.0)
