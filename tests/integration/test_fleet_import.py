"""From an inventory to devices that are online, with real processes on both sides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from broker_server.fleet_inventory import read_inventory
from tests.support.tls_site import TlsSite

pytestmark = pytest.mark.integration


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsSite]:
    site = TlsSite(tmp_path_factory.mktemp("site"))
    try:
        site.start_server()
        yield site
    finally:
        site.close()


def test_devices_of_an_inventory_enrol_with_their_own_tokens_and_come_online(
    site: TlsSite,
) -> None:
    inventory, tokens_file = site.folder / "inventory.yml", site.folder / "tokens.yml"
    inventory.write_text("devices: {hosts: {pi: {ansible_host: 10.0.0.21}, orin: }}\n")
    done = site.legend("fleet", "import", str(inventory), "--tokens", str(tokens_file))
    assert done.returncode == 0, done.stderr
    assert site.state_of("pi") == "expected"

    tokens = yaml.safe_load(tokens_file.read_text())
    assert set(tokens) == {"orin", "pi"}
    taken = site.enroll("orin", tokens["pi"])
    assert taken.returncode == 77, taken.stdout
    assert site.enroll("pi", tokens["pi"]).returncode == 0
    site.start_agent("pi", "start")
    site.until(lambda: site.state_of("pi") == "online", "the agent is online")

    again = site.legend("fleet", "import", str(inventory), "--tokens", str(tokens_file))
    assert again.returncode == 0, again.stderr
    assert set(yaml.safe_load(tokens_file.read_text())) == {"orin"}
    out = site.folder / "out.yml"
    assert site.legend("fleet", "export", "--out", str(out)).returncode == 0
    exported = {host.device_id: host.address for host in read_inventory(out)}
    assert exported == {"orin": "", "pi": "10.0.0.21"}
    assert yaml.safe_load(out.read_text())["devices"]["vars"]["edge_agent_server"] == site.url
