from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_agent.admission import AdmissionRequest, Admitted, MemoryModel, admit
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.lora import LoraConfig
from wire_protocol.parts import ComputeReport

MB = 10**6

# RoBERTa-base at 128 tokens, as measured: 820 MB + batch x (11 + 14.3 x depth) MB.
ROBERTA = MemoryModel(
    base_bytes=820 * MB, bytes_per_token=11 * MB / 128, bytes_per_token_layer=14.3 * MB / 128
)


def asked(depth: int = 12, batch_size: int = 16) -> AdmissionRequest:
    return AdmissionRequest(
        lora=LoraConfig.top(depth, (8,) * 12), batch_size=batch_size, max_tokens=128
    )


def peak(choice: Admitted, request: AdmissionRequest, memory: MemoryModel) -> float:
    """The memory model written down a second time."""
    layers = 1 + 0.2 * (choice.depth - 1) if choice.gradient_checkpointing else choice.depth
    tokens = choice.batch_size * request.max_tokens
    return memory.base_bytes + tokens * (
        memory.bytes_per_token + memory.bytes_per_token_layer * layers
    )


requests = st.builds(
    lambda layers, frozen, batch, tokens: AdmissionRequest(
        lora=LoraConfig.top(max(1, layers - frozen), (4,) * layers),
        batch_size=batch,
        max_tokens=tokens,
    ),
    st.integers(1, 48),
    st.integers(0, 47),
    st.integers(1, 512),
    st.integers(4, 2048),
)
memories = st.builds(
    MemoryModel,
    base_bytes=st.integers(0, 8_000 * MB).map(float),
    bytes_per_token=st.floats(0, 1e6),
    bytes_per_token_layer=st.floats(0, 1e6),
)
budgets = st.integers(0, 32_000 * MB)


@pytest.mark.parametrize(
    ("budget_mb", "batch_size", "checkpointing", "depth"),
    [
        (8000, 16, False, 12),
        (2400, 8, False, 12),
        (1600, 4, False, 12),
        (1100, 4, True, 12),
        (1000, 4, True, 7),
        (925, 4, False, 1),
        (872, 2, False, 1),
        (846, 1, False, 1),
    ],
)
def test_remedies_are_taken_in_order_as_memory_shrinks(
    budget_mb: int, batch_size: int, checkpointing: bool, depth: int
) -> None:
    admitted = admit(asked(), ROBERTA, budget_bytes=budget_mb * MB)
    assert (admitted.batch_size, admitted.gradient_checkpointing, admitted.depth) == (
        batch_size,
        checkpointing,
        depth,
    )


def test_what_fits_as_asked_needs_no_reason() -> None:
    assert admit(asked(), ROBERTA, budget_bytes=8000 * MB) == Admitted(
        16, gradient_checkpointing=False, depth=12, reason=""
    )


def test_the_reason_names_every_change_and_the_budget() -> None:
    admitted = admit(asked(), ROBERTA, budget_bytes=1000 * MB)
    assert admitted.reason == (
        "batch 16 -> 4, gradient checkpointing, depth 12 -> 7 to fit into 1000 MB"
    )


def test_a_device_too_small_for_one_example_refuses_with_the_numbers() -> None:
    with pytest.raises(DeviceError, match=r"needs 845 MB, 800 MB are free") as refusal:
        admit(asked(), ROBERTA, budget_bytes=800 * MB)
    assert refusal.value.code is FailureCode.DOES_NOT_FIT


def test_the_model_covers_the_measured_peaks() -> None:
    for depth, batch_size, measured_mb in ((12, 16, 3744), (6, 16, 2366), (1, 16, 1231)):
        expected = ROBERTA.peak_bytes(
            tokens=batch_size * 128, depth=depth, gradient_checkpointing=False
        )
        assert expected == pytest.approx(measured_mb * MB, rel=0.1)
    expected = ROBERTA.peak_bytes(tokens=16 * 128, depth=12, gradient_checkpointing=True)
    assert expected >= 1521 * MB


def test_checkpointing_is_not_used_where_it_saves_nothing() -> None:
    for budget_mb in range(846, 1300, 10):
        assert not admit(
            asked(depth=1), ROBERTA, budget_bytes=budget_mb * MB
        ).gradient_checkpointing


def test_the_numbers_of_a_benchmark_become_the_memory_model() -> None:
    report = ComputeReport(
        model_digest="0" * 64,
        forward_seconds_per_token_layer=1.0,
        backward_seconds_per_token_layer=1.0,
        memory_base_bytes=5,
        memory_bytes_per_token=6.0,
        memory_bytes_per_token_layer=7.0,
    )
    assert MemoryModel.of(report) == MemoryModel(5.0, 6.0, 7.0)


@given(requests, memories, budgets)
def test_nothing_admitted_exceeds_the_budget_or_the_assignment(
    request: AdmissionRequest, memory: MemoryModel, budget_bytes: int
) -> None:
    try:
        admitted = admit(request, memory, budget_bytes=budget_bytes)
    except DeviceError:
        smallest = Admitted(1, gradient_checkpointing=False, depth=1, reason="")
        assert peak(smallest, request, memory) > budget_bytes
        return
    assert peak(admitted, request, memory) <= budget_bytes
    assert 1 <= admitted.batch_size <= request.batch_size
    assert 1 <= admitted.depth <= request.lora.depth


@given(requests, memories, budgets, budgets)
def test_more_memory_never_admits_less(
    request: AdmissionRequest, memory: MemoryModel, one: int, other: int
) -> None:
    small, large = sorted((one, other))
    try:
        with_less = admit(request, memory, budget_bytes=small)
    except DeviceError:
        assume(False)
    with_more = admit(request, memory, budget_bytes=large)
    assert with_more.batch_size >= with_less.batch_size
    assert with_more.depth >= with_less.depth


@given(requests, memories)
def test_enough_memory_admits_exactly_what_was_asked(
    request: AdmissionRequest, memory: MemoryModel
) -> None:
    wanted = Admitted(
        request.batch_size, gradient_checkpointing=False, depth=request.lora.depth, reason=""
    )
    budget_bytes = int(peak(wanted, request, memory)) + 1
    assert admit(request, memory, budget_bytes=budget_bytes) == wanted


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(0, 16), (4, 0)])
def test_an_empty_request_cannot_be_built(batch_size: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        AdmissionRequest(LoraConfig((8,)), batch_size, max_tokens)
