"""A device whose owner's policy forbids training says why, to its owner and to the fleet's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.site import open_site

pytestmark = [pytest.mark.e2e, pytest.mark.train]


def test_the_reason_is_seen_on_the_device_at_the_server_and_in_the_run(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        site.start_agent("picky", training={"disk_free_bytes": 2**60})
        site.until(
            lambda: site.devices().get("picky", {}).get("not_training"), "the server hears why"
        )
        at_server = site.devices()["picky"]["not_training"]
        assert "disk" in at_server
        site.until(lambda: site.status("picky")["not_training"] == at_server, "so does its owner")
        run_id = site.launch(rounds=1)
        site.until(lambda: "picky" in site.run(run_id)["reason"], "the run says whom it waits for")
        assert site.run(run_id)["status"] == "running"
