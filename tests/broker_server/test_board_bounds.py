"""What devices report, held against board profiles and the server's clock."""

from __future__ import annotations

import pytest

from broker_server.board_bounds import bounds_of, cross_checked
from profiles.loader import load_board
from tests.support.messages import a_report
from wire_protocol.model_family import ModelShape

SHAPE = ModelShape("bert", 6, 384, 384, 1_769_472)


def test_a_known_board_has_the_speed_and_the_memory_of_its_profile() -> None:
    board = load_board("jetson-tx2")

    bounds = bounds_of("jetson-tx2", SHAPE)

    assert bounds is not None
    assert bounds.memory_bytes == board.memory_bytes
    expected = 2 * SHAPE.weights_per_layer / (board.training_gflops.value * 1e9)
    assert bounds.s_per_token_layer == pytest.approx(expected)


@pytest.mark.parametrize("board_id", ["generic-x86-64", "generic-arm64", "toaster"])
def test_a_board_that_could_be_anything_has_no_bounds(board_id: str) -> None:
    assert bounds_of(board_id, SHAPE) is None


def test_a_report_that_can_be_true_stays_as_it_is() -> None:
    report = a_report()

    assert cross_checked(report, 2.5) == (report, "")


def test_times_longer_than_the_round_shrink_to_it() -> None:
    report, why = cross_checked(a_report(forward_s=60.0, backward_s=40.0), 10.0)

    total = report.forward_s + report.backward_s + report.download_s + report.upload_s
    assert total == pytest.approx(10.0)
    assert report.forward_s / report.backward_s == pytest.approx(1.5)
    assert why == "it says 100.2 s for a round that took 10.0 s here"
