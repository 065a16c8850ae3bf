"""From a token to a member of the fleet, with real processes on both sides."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from edge_agent.identity import Identity, load_identity
from tests.support.identities import a_pki, an_identity
from tests.support.tls_site import TlsSite
from tests.support.wrong_clock import wrong_clock
from wire_protocol.durable import DIE_AT

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsSite]:
    site = TlsSite(tmp_path_factory.mktemp("site"))
    try:
        site.start_server()
        yield site
    finally:
        site.close()


def identity(site: TlsSite, name: str) -> Identity:
    return load_identity(site.folder / name / "identity", device_id=name, now=time.time())


def nothing_usable(site: TlsSite, name: str) -> bool:
    return not (site.folder / name / "identity").exists()


def operator_key_of(site: TlsSite) -> str:
    """What an enrolled device believes; an identity made by hand needs it too."""
    assert site.enroll("believer", site.token("believer")).returncode == 0
    return (site.folder / "believer" / "identity" / "operator.pub").read_text()


def one_error(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "Traceback" not in text
    return line


def test_a_device_is_accepted_joins_over_mutual_tls_and_is_thrown_out(site: TlsSite) -> None:
    token = site.token()
    enrolling = site.start_agent(
        "nano", "enroll", "--url", site.url, "--token", token, "--wait-s", "120"
    )
    site.until(lambda: "nano" in site.pending(), "the device waits")
    assert nothing_usable(site, "nano")
    accepted = site.legend("devices", "accept", "nano")
    assert accepted.returncode == 0, accepted.stderr
    assert enrolling.wait(120) == 0, site.log("nano")
    folder = identity(site, "nano").folder
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "ca.pem": 0o600,
        "device.key": 0o600,
        "device.pem": 0o600,
        "operator.pub": 0o600,
    }
    assert folder.stat().st_mode & 0o777 == 0o700

    agent = site.start_agent("nano", "start")
    site.until(lambda: site.state_of("nano") == "online", "the agent is online")
    status = Path(f"/proc/{agent.pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) * 1024 < 60e6  # as without an identity
    with httpx.Client(verify=identity(site, "nano").context) as client:
        joined = client.get(f"{site.url}/v1/join?device_id=nano").json()
    assert joined["broker_url"].startswith("mqtts://")
    assert "@" not in joined["broker_url"]  # no password: the certificate is what lets it in
    assert 0 < joined["certificate_left_s"] <= 90 * 86400

    assert site.legend("devices", "revoke", "nano").returncode == 0
    assert agent.wait(120) == 77
    assert "certificate of nano is revoked" in one_error(site.log("nano"))
    site.until(lambda: '"device_lost"' in site.log("server"), "its session ends")
    assert site.state_of("nano") == "revoked"
    before = identity(site, "nano").certificate.public_key
    again = site.enroll("nano", site.token(), "--again", "--wait-s", "0")
    assert again.returncode == 75, again.stderr
    assert site.legend("devices", "accept", "nano").returncode == 0
    assert site.agent("nano", "enroll").returncode == 0
    assert identity(site, "nano").certificate.public_key != before


def test_a_token_made_for_a_device_needs_nobody(site: TlsSite) -> None:
    done = site.enroll("orin", site.token("orin"))
    assert done.returncode == 0, done.stderr
    assert identity(site, "orin").device_id == "orin"
    again = site.agent("orin", "enroll")
    assert (again.returncode, "enrolled already" in again.stdout) == (0, True)


def test_who_is_not_accepted_yet_goes_on_later_with_the_same_key(site: TlsSite) -> None:
    first = site.enroll("tx2", site.token(), "--wait-s", "0")
    assert first.returncode == 75
    assert "legend devices accept tx2" in first.stdout
    assert nothing_usable(site, "tx2")
    key = (site.folder / "tx2" / "identity.pending" / "device.key").read_bytes()
    site.legend("devices", "accept", "tx2")
    second = site.agent("tx2", "enroll")
    assert second.returncode == 0, second.stderr
    assert (identity(site, "tx2").folder / "device.key").read_bytes() == key
    assert not (site.folder / "tx2" / "identity.pending").exists()


def test_a_rejected_device_hears_it_and_keeps_nothing(site: TlsSite) -> None:
    token = site.token()
    assert site.enroll("stranger", token, "--wait-s", "0").returncode == 75
    assert site.legend("devices", "reject", "stranger").returncode == 0
    done = site.agent("stranger", "enroll")
    assert done.returncode == 77
    assert "an operator rejected 'stranger'" in one_error(done.stderr)
    assert nothing_usable(site, "stranger")
    assert not (site.folder / "stranger" / "identity.pending").exists()
    # The same token serves no other key.
    assert "has been used" in one_error(site.enroll("stranger", token).stderr)


def _of_another_server(site: TlsSite) -> str:
    other = a_pki(site.folder / "other")
    return other.create_token(time.time())


def _used(site: TlsSite) -> str:
    token = site.token()
    assert site.enroll("first-user", token, "--wait-s", "0").returncode == 75
    return token


@pytest.mark.parametrize(
    ("make_token", "code", "words"),
    [
        (lambda site: f"guessed.{site.pki.ca_fingerprint}", 77, "token is unknown"),
        (_used, 77, "token has been used"),
        (lambda site: site.token(ttl_s=0.0), 77, "token has expired"),
        (lambda site: site.token("another"), 77, "not for device latecomer"),
        (_of_another_server, 78, "is not the server that made this token"),
        (lambda site: site.token().partition(".")[0], 78, "copy the whole line"),
    ],
    ids=["unknown", "used", "expired", "another's", "another authority", "half"],
)
def test_a_bad_token_is_one_line_and_leaves_nothing_usable(
    site: TlsSite, make_token: Callable[[TlsSite], str], code: int, words: str
) -> None:
    done = site.enroll("latecomer", make_token(site))
    assert done.returncode == code, done.stderr
    assert words in one_error(done.stderr)
    assert nothing_usable(site, "latecomer")


def test_a_device_of_another_fleet_is_told_so_before_it_asks(site: TlsSite) -> None:
    done = site.enroll("lost-sheep", site.token(), fleet="elsewhere")
    assert done.returncode == 78
    assert "leads fleet 'lab'" in one_error(done.stderr)
    assert "lost-sheep" not in site.pending()


def test_an_enrolment_without_tls_is_refused_before_anything_is_sent(site: TlsSite) -> None:
    arguments = ("enroll", "--url", "http://localhost:1", "--token", site.token())
    done = site.agent("plain", *arguments)
    assert done.returncode == 78
    assert "https://" in one_error(done.stderr)


def test_an_enrolled_device_refuses_to_talk_without_tls(site: TlsSite) -> None:
    assert site.enroll("careful", site.token("careful")).returncode == 0
    done = site.agent("careful", "start", server=f"http://localhost:{site.port}")
    assert done.returncode == 78
    assert "https" in one_error(done.stderr)


def test_an_identity_of_another_name_ends_the_agent_with_one_line(site: TlsSite) -> None:
    assert site.enroll("renamed", site.token("renamed")).returncode == 0
    done = site.agent("renamed", "start", device_id="new-name")
    assert done.returncode == 78
    assert "'renamed'" in one_error(done.stderr)


POINTS = [
    "agent.enrolment/done",
    "agent.device_key/done",
    "agent.authority/done",
    "agent.first_certificate/half",
    "agent.first_certificate/written",
    "agent.first_certificate/done",
    "agent.enrolment.done/done",
    "agent.identity/written",
    "agent.identity/done",
]


@pytest.mark.parametrize("point", POINTS)
def test_a_device_that_dies_while_it_enrols_has_nothing_or_everything_and_goes_on(
    site: TlsSite, point: str
) -> None:
    name = "dies-" + point.replace("agent.", "").replace(".", "-").replace("_", "-").replace(
        "/", "-"
    )
    token = site.token(name)
    died = site.enroll(name, token, environment={DIE_AT: point})
    assert died.returncode == -9, died.stderr
    if not nothing_usable(site, name):
        identity(site, name)
    done = site.agent(name, "enroll")
    assert done.returncode == 0, done.stderr
    assert identity(site, name).device_id == name
    leftovers = {path.name for path in (site.folder / name).iterdir()}
    assert leftovers == {"identity", "identity.lock"}


@pytest.mark.parametrize(
    "point", ["agent.identity.replaced/written", "agent.identity.replaced/done"]
)
def test_a_device_that_dies_while_it_is_enrolled_again_keeps_the_old_or_gets_the_new_identity(
    site: TlsSite, point: str
) -> None:
    name = f"again-{point.rpartition('/')[2]}"
    assert site.enroll(name, site.token(name)).returncode == 0
    before = identity(site, name).certificate.public_key
    died = site.enroll(name, site.token(name), "--again", environment={DIE_AT: point})
    assert died.returncode == -9, died.stderr
    done = site.agent(name, "enroll")
    assert done.returncode == 0, done.stderr
    assert identity(site, name).certificate.public_key != before
    assert not (site.folder / name / "identity.replaced").exists()


@pytest.mark.parametrize("since", ["1970", "two months ago"])
def test_a_board_whose_clock_is_wrong_enrols_and_joins(
    site: TlsSite, tmp_path: Path, since: str
) -> None:
    name = f"no-battery-{since.partition(' ')[0]}"
    behind_s = int(time.time()) if since == "1970" else 60 * 86400
    environment = wrong_clock(tmp_path, -behind_s)
    done = site.enroll(name, site.token(name), environment=environment)
    assert done.returncode == 0, done.stderr
    site.start_agent(name, "start", environment=environment)
    site.until(lambda: site.state_of(name) == "online", "it joins over mutual TLS")


def test_a_certificate_past_two_thirds_of_its_life_is_renewed_while_the_agent_works(
    site: TlsSite,
) -> None:
    folder = an_identity(
        site.pki, site.folder / "veteran" / "identity", "veteran", now=time.time() - 70 * 86400
    )
    (site.folder / "veteran").chmod(0o700)
    (folder / "operator.pub").write_text(operator_key_of(site))
    before = identity(site, "veteran").certificate
    site.start_agent("veteran", "start")
    site.until(
        lambda: identity(site, "veteran").certificate.serial != before.serial,
        "the certificate is renewed",
    )
    after = identity(site, "veteran").certificate
    assert after.not_after > before.not_after
    assert after.public_key == before.public_key
    site.until(lambda: site.state_of("veteran") == "online", "it goes on")
    # The one before stays good until it ends: a device that died now would come back with it.
    assert not site.pki.is_revoked(before.serial)


def test_a_server_that_dies_between_certificate_and_answer_lets_the_device_in_when_it_is_back(
    tmp_path: Path,
) -> None:
    site = TlsSite(tmp_path)
    try:
        # The first decision that it writes is that the device waits, the second lets it in.
        site.start_server(**{DIE_AT: "server.enrolment/half#2"})
        arguments = ("enroll", "--url", site.url, "--token", site.token("pi"), "--wait-s", "120")
        enrolling = site.start_agent("pi", *arguments)
        assert site.processes["server"].wait(120) == -9
        assert len(list((tmp_path / "pki" / "enrolments").glob("*.json"))) == 1
        site.start_server()
        assert enrolling.wait(120) == 0, site.log("pi")
        assert identity(site, "pi").device_id == "pi"
    finally:
        site.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_that_root_makes_belong_to_the_owner_of_the_state_directory(site: TlsSite) -> None:
    state_dir = site.folder / "service"
    state_dir.mkdir()
    os.chown(state_dir, 65534, 65534)
    assert site.enroll("service", site.token("service")).returncode == 0
    owners = {path.stat().st_uid for path in (state_dir, *state_dir.rglob("*"))}
    assert owners == {65534}
