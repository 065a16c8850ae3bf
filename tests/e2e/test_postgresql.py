"""The server on PostgreSQL: the same promises, and a database that goes away and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_server.disk_space import DatabaseUnavailable
from broker_server.run_state import RoundResult
from broker_server.store import Store
from tests.e2e.test_kills import slow_settings
from tests.support.postgres import Postgres, postgres
from tests.support.run_json import Json
from tests.support.site import Site
from wire_protocol.errors import ConfigError

pytestmark = [pytest.mark.e2e, pytest.mark.train]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Postgres]:
    with postgres(tmp_path) as server:
        yield server


class PostgresSite(Site):
    """A server whose state is in PostgreSQL."""

    database_url = ""

    def server_settings(self, port: int) -> Json:
        return {**super().server_settings(port), "database": self.database_url}


def test_the_store_keeps_its_promises_and_names_an_outage(database: Postgres) -> None:
    store = Store(database.url)
    store.create_run("run", "{}")
    assert store.record_update("run", 1, "a", "first")
    assert not store.record_update("run", 1, "a", "again")
    store.save_checkpoint("run", "after", result=(1, "result"))
    database.stop()
    with pytest.raises(DatabaseUnavailable, match="cannot be used now"):
        store.run("run")
    with pytest.raises(DatabaseUnavailable, match="cannot be used now"):
        store.record_update("run", 1, "b", "first")
    database.start()
    record = store.run("run")
    assert record is not None
    assert (record.checkpoint, list(store.rounds("run"))) == ("after", ["result"])
    assert store.record_update("run", 1, "b", "first")
    assert store.last_round("run") == "result"
    store.close()


def test_a_wrong_password_is_one_line_that_does_not_tell_it(database: Postgres) -> None:
    with pytest.raises(ConfigError, match="password authentication failed") as caught:
        Store(database.url.replace("secret", "guessed"))
    assert "guessed" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_survives_an_outage_of_the_database(tmp_path: Path, database: Postgres) -> None:
    site = PostgresSite(tmp_path, "embedded")
    site.database_url = database.url
    try:
        site.start_server()
        site.add_model()
        site.start_agent("left", **slow_settings())
        site.wait_for_devices("left")
        run_id = site.launch(rounds=3, local_steps=6)
        site.wait_until_training(run_id, "left", round_number=2)
        database.stop()
        site.until(lambda: "cannot be used now" in site.log("server"), "the server notices")
        assert site.processes["server"].poll() is None
        database.start()
        run = site.wait_for_end(run_id)
    finally:
        site.close()
    assert run["status"] == "finished", run["reason"]
    store = Store(database.url)
    rounds = [RoundResult.model_validate_json(text) for text in store.rounds(run_id)]
    kept = [set(store.updates(run_id, one.round)) for one in rounds]
    store.close()
    assert kept == [{"left"}] * 3
    assert "Traceback" not in site.log("server")
