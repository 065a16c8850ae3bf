"""Who may do what over HTTP, decided without a network."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.access import (
    NOBODY,
    RULES,
    Asked,
    Condition,
    Identity,
    Refusal,
    Role,
    Rule,
    refusal_of,
    rule_for,
)
from broker_server.grants import Assignment, Grants, largest_update_bytes
from wire_protocol.model_family import ModelShape

ADAPTER, MODEL, FILE, OTHERS = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)

DEVICE = Identity(device="pi")
VIEWER = Identity(role=Role.VIEWER, name="dashboard")
OPERATOR = Identity(role=Role.OPERATOR, name="ann")
SHARED_TOKEN = Identity(role=Role.OPERATOR, undivided=True)
WHO = {"nobody": NOBODY, "device": DEVICE, "viewer": VIEWER, "operator": OPERATOR}

# n: nobody, d: device, v: viewer, o: operator
ALLOWED = {
    "GET /openapi.json": "vo",
    "GET /docs": "vo",
    "GET /docs/oauth2-redirect": "vo",
    "GET /redoc": "vo",
    "GET /metrics": "vo",
    "GET /v1/health": "vo",
    "GET /v1/doctor": "vo",
    "POST /v1/backup": "o",
    "GET /v1/ca": "ndvo",
    "POST /v1/enroll": "ndvo",
    "GET /v1/enrolments": "vo",
    "PUT /v1/expected": "o",
    "POST /v1/devices/{device_id}/accept": "o",
    "POST /v1/devices/{device_id}/reject": "o",
    "POST /v1/devices/{device_id}/revoke": "o",
    "GET /v1/join": "d",
    "GET /v1/devices": "vo",
    "GET /v1/models": "dvo",
    "POST /v1/models": "o",
    "GET /v1/models/{name_or_digest}": "dvo",
    "GET /v1/runs": "vo",
    "POST /v1/runs": "o",
    "GET /v1/runs/{run_id}": "vo",
    "POST /v1/runs/{run_id}/cancel": "o",
    "GET /v1/runs/{run_id}/files": "vo",
    "GET /v1/runs/{run_id}/files/{name:path}": "vo",
    "POST /v1/blobs": "do",
    "PATCH /v1/blobs/{sha256}": "do",
    "GET /v1/blobs/{sha256}": "do",
    "GET /v1/probe": "do",
    "POST /v1/probe": "do",
}


@pytest.fixture
def grants() -> Grants:
    """The device ``pi`` has one base model and one assignment."""
    grants = Grants()
    grants.know_model(MODEL, [FILE])
    grants.allow_model(MODEL, "pi")
    grants.record("pi", Assignment("run.1-0.pi", frozenset({ADAPTER}), 1000))
    return grants


def decide(
    grants: Grants, who: Identity, method: str, path: str, query: str = ""
) -> Refusal | None:
    return refusal_of(who, Asked(method, path, query), rule_for(method, path), grants)


def filled_in(template: str) -> str:
    values = {"{sha256}": ADAPTER, "{name_or_digest}": MODEL, "{name:path}": "plots/a.png"}
    for name, value in values.items():
        template = template.replace(name, value)
    return template.replace("{run_id}", "run-1").replace("{device_id}", "pi")


def test_the_table_says_exactly_what_this_one_says() -> None:
    assert {f"{rule.method} {rule.path}" for rule in RULES} == set(ALLOWED)
    assert len(RULES) == len(ALLOWED)


@pytest.mark.parametrize(("route", "who"), list(itertools.product(ALLOWED, WHO)))
def test_everybody_is_let_in_where_the_table_says_and_nowhere_else(
    grants: Grants, route: str, who: str
) -> None:
    method, _, template = route.partition(" ")
    refusal = decide(grants, WHO[who], method, filled_in(template))
    if who[0] in ALLOWED[route]:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.status == (401 if who == "nobody" else 403)


@pytest.mark.parametrize("route", ALLOWED)
def test_without_certificates_an_operator_is_every_device_and_a_viewer_is_none(
    grants: Grants, route: str
) -> None:
    method, _, template = route.partition(" ")
    path = filled_in(template)
    assert decide(grants, SHARED_TOKEN, method, path, "device_id=any") is None
    viewer = Identity(role=Role.VIEWER, undivided=True)
    assert (decide(grants, viewer, method, path) is None) == ("v" in ALLOWED[route])


def test_a_device_with_an_operators_token_may_what_either_may(grants: Grants) -> None:
    both = Identity("pi", Role.OPERATOR, "ann")
    assert both.owner is None
    assert decide(grants, both, "GET", f"/v1/blobs/{OTHERS}") is None
    assert decide(grants, both, "GET", "/v1/join", "device_id=pi") is None
    assert decide(grants, both, "GET", "/v1/join", "device_id=nano") is not None


def test_a_viewers_token_adds_reading_to_a_device_and_no_blobs(grants: Grants) -> None:
    both = Identity("pi", Role.VIEWER, "ann")
    assert both.owner == "pi"
    assert decide(grants, both, "GET", "/v1/runs") is None
    assert decide(grants, both, "POST", "/v1/runs") is not None
    assert decide(grants, both, "GET", f"/v1/blobs/{OTHERS}") is not None


@pytest.mark.parametrize(
    "query",
    ["device_id=nano", "device_id=pi&device_id=nano", "device_id=nano&device_id=pi", "device_id="],
)
def test_a_device_joins_as_itself_only(grants: Grants, query: str) -> None:
    refusal = decide(grants, DEVICE, "GET", "/v1/join", query)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (403, "other_device")
    assert decide(grants, DEVICE, "GET", "/v1/join", "device_id=pi") is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/runs/", 404),
        ("GET", "/v1/devices\n", 404),
        ("GET", "//v1/devices", 404),
        ("GET", "/V1/devices", 404),
        ("DELETE", "/v1/devices", 405),
        ("OPTIONS", "/v1/runs", 405),
        ("GET", "/v1/blobs/a/b", 404),
    ],
)
def test_a_route_without_a_rule_is_closed_to_everybody(
    grants: Grants, method: str, path: str, status: int
) -> None:
    for who in (OPERATOR, SHARED_TOKEN, VIEWER, DEVICE):
        refusal = decide(grants, who, method, path)
        assert refusal is not None
        assert refusal.status == status
    stranger = decide(grants, NOBODY, method, path)
    assert stranger is not None
    assert stranger.status == 401


def test_asking_for_the_head_takes_the_right_to_the_whole(grants: Grants) -> None:
    assert decide(grants, DEVICE, "HEAD", f"/v1/blobs/{ADAPTER}") is None
    assert decide(grants, DEVICE, "HEAD", f"/v1/blobs/{OTHERS}") is not None


def test_only_bodies_that_are_read_in_pieces_have_no_bound() -> None:
    streamed = {f"{rule.method} {rule.path}" for rule in RULES if rule.largest_body_bytes is None}
    assert streamed == {"PATCH /v1/blobs/{sha256}", "POST /v1/probe"}


def test_every_place_that_names_a_blob_or_a_model_is_under_a_condition() -> None:
    for rule in RULES:
        if "{sha256}" in rule.path and rule.method == "GET":
            assert rule.condition is Condition.GRANTED_BLOB
        if "{name_or_digest}" in rule.path:
            assert rule.condition is Condition.GRANTED_MODEL


def test_dots_in_a_rule_stand_for_themselves() -> None:
    assert isinstance(rule_for("GET", "/openapi.json"), Rule)
    assert isinstance(rule_for("GET", "/openapiXjson"), Refusal)


# Grants


def test_a_device_reads_what_it_was_given_and_nothing_else(grants: Grants) -> None:
    assert grants.may_read("pi", ADAPTER)
    assert grants.may_read("pi", FILE)
    assert grants.may_describe("pi", MODEL)
    assert not grants.may_read("pi", OTHERS)
    assert not grants.may_describe("pi", OTHERS)
    for blob in (ADAPTER, FILE):
        assert not grants.may_read("nano", blob)
    assert not grants.may_describe("nano", MODEL)


def test_a_model_for_everybody_is_for_devices_that_are_not_known_yet(grants: Grants) -> None:
    grants.allow_model(MODEL)
    assert grants.may_read("nano", FILE)
    assert not grants.may_read("nano", ADAPTER)


def test_without_an_open_assignment_nothing_is_taken(grants: Grants) -> None:
    refusal = grants.may_write("nano", 1)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (403, "no_assignment")


def test_an_update_larger_than_its_assignment_can_need_is_refused(grants: Grants) -> None:
    assert grants.may_write("pi", 1000) is None
    refusal = grants.may_write("pi", 1001)
    assert refusal is not None
    assert refusal.status == 413


def test_the_next_assignment_takes_the_place_of_the_one_before(grants: Grants) -> None:
    following = Assignment("run.2-0.pi", frozenset({OTHERS}), 5)
    assert grants.record("pi", following)
    assert not grants.may_read("pi", ADAPTER)
    assert grants.may_read("pi", OTHERS)
    assert grants.may_write("pi", 6) is not None
    assert not grants.record("pi", following)


def test_an_assignment_that_is_sent_again_keeps_what_was_reported(grants: Grants) -> None:
    grants.reported("pi", "m1", "run.1-0.pi")
    assert not grants.record("pi", Assignment("run.1-0.pi", frozenset({ADAPTER}), 1000))
    assert grants.answered("pi", "m1")


def test_the_answer_to_its_report_closes_an_assignment(grants: Grants) -> None:
    grants.reported("pi", "m1", "run.1-0.pi")
    grants.reported("pi", "m2", "run.1-0.pi")
    assert not grants.answered("pi", "other")
    assert not grants.answered("nano", "m1")
    assert grants.answered("pi", "m1")
    assert not grants.may_read("pi", ADAPTER)
    assert grants.may_write("pi", 1) is not None
    assert grants.may_read("pi", FILE), "the base model stays its own"


def test_the_answer_to_an_old_report_does_not_close_the_next_assignment(grants: Grants) -> None:
    grants.reported("pi", "m1", "run.1-0.pi")
    grants.record("pi", Assignment("run.2-0.pi", frozenset({OTHERS}), 5))
    grants.reported("pi", "m2", "run.1-0.pi")
    assert not grants.answered("pi", "m1")
    assert not grants.answered("pi", "m2")
    assert grants.works_on("pi", "run.2-0.pi")


def test_a_cancelled_assignment_is_closed_and_another_is_not(grants: Grants) -> None:
    assert not grants.forget("pi", "run.2-0.pi")
    assert not grants.forget("nano", "run.1-0.pi")
    assert grants.forget("pi", "run.1-0.pi")
    assert grants.devices() == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["record", "report", "answer", "forget"]),
            st.sampled_from(["pi", "nano"]),
            st.integers(0, 2),
        ),
        max_size=30,
    )
)
def test_whatever_happens_to_one_device_changes_nothing_for_the_other(
    steps: list[tuple[str, str, int]],
) -> None:
    together, alone = Grants(), Grants()
    for step, device, number in steps:
        for grants in (together, alone) if device == "pi" else (together,):
            match step:
                case "record":
                    grants.record(
                        device, Assignment(f"{device}-{number}", frozenset({ADAPTER}), number)
                    )
                case "report":
                    grants.reported(device, f"m{number}", f"{device}-{number}")
                case "answer":
                    grants.answered(device, f"m{number}")
                case _:
                    grants.forget(device, f"{device}-{number}")
    for size_bytes in range(3):
        assert together.may_write("pi", size_bytes) == alone.may_write("pi", size_bytes)
    assert together.may_read("pi", ADAPTER) == alone.may_read("pi", ADAPTER)


def test_an_update_may_be_as_large_as_its_ranks_in_fp32() -> None:
    shape = ModelShape("bert", 2, 8, 8, 1)
    # Two modules a layer, one layer, rank 4: A and B of 4 x 8 each; a head of 3 x 8 and 3.
    values = 2 * 2 * 4 * 8 + 3 * 8 + 3
    largest = largest_update_bytes(shape, (0, 4), 3)
    assert 4 * values < largest < 4 * values + 10_000
    assert largest_update_bytes(shape, (4, 4), 3) > largest
    assert largest_update_bytes(shape, (0, 4), 3, factors="A") < largest
