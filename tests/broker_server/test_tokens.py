"""Operators' tokens: on disk, at the command line, and against a file that somebody damaged."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from broker_server.access import Role
from broker_server.cli import main
from broker_server.tokens import TokenStore
from wire_protocol.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path)


def test_a_token_is_known_by_its_role_and_only_whole(store: TokenStore) -> None:
    token = store.create("dashboard", Role.VIEWER, 1.0)
    found = store.find(token)
    assert found is not None
    assert (found.name, found.role) == ("dashboard", Role.VIEWER)
    for wrong in ("", token[:-1], token + "x", token.upper(), token + "\n", "\x00", "é"):
        assert store.find(wrong) is None


def test_the_file_holds_no_secret_and_is_for_the_server_only(
    store: TokenStore, tmp_path: Path
) -> None:
    token = store.create("ann", Role.OPERATOR, 1.0)
    file = tmp_path / "tokens.json"
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert len(token) >= 40


def test_tokens_are_never_the_same(store: TokenStore) -> None:
    made = {store.create(f"n{number}", Role.VIEWER, 1.0) for number in range(20)}
    assert len(made) == 20


def test_another_process_that_runs_already_notices_changes_at_once(
    store: TokenStore, tmp_path: Path
) -> None:
    running = TokenStore(tmp_path)
    assert running.records() == ()
    token = store.create("ann", Role.OPERATOR, 1.0)
    assert running.find(token) is not None
    store.revoke("ann", 2.0)
    assert running.find(token) is None


def test_a_revoked_token_stays_listed_and_its_name_is_free_again(store: TokenStore) -> None:
    first = store.create("ann", Role.OPERATOR, 1.0)
    store.revoke("ann", 2.0)
    second = store.create("ann", Role.VIEWER, 3.0)
    assert store.find(first) is None
    found = store.find(second)
    assert found is not None
    assert found.role is Role.VIEWER
    assert [record.revoked_at for record in store.records()] == [2.0, None]


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "-x", "x" * 49, "../x", "é"])
def test_a_name_that_could_be_mistaken_is_refused(store: TokenStore, name: str) -> None:
    with pytest.raises(ConfigError, match="token name"):
        store.create(name, Role.VIEWER, 1.0)


def test_a_name_means_one_active_token(store: TokenStore) -> None:
    store.create("ann", Role.VIEWER, 1.0)
    with pytest.raises(ConfigError, match="already"):
        store.create("ann", Role.OPERATOR, 1.0)
    with pytest.raises(ConfigError, match=r"no active token 'bob' \(active: ann\)"):
        store.revoke("bob", 1.0)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tokens": [1]}', '{"tokens": [{"name": "x", "role": "root"}]}', "\x00"],
)
def test_a_damaged_file_lets_nobody_in(store: TokenStore, tmp_path: Path, content: str) -> None:
    token = store.create("ann", Role.OPERATOR, 1.0)
    (tmp_path / "tokens.json").write_text(content)
    for _ in range(2):
        with pytest.raises(ConfigError, match="damaged"):
            store.find(token)


def test_tokens_that_are_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    def make(number: int) -> None:
        TokenStore(tmp_path).create(f"n{number}", Role.VIEWER, 1.0)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(TokenStore(tmp_path).records()) == 8


# The command


def run(tmp_path: Path, *arguments: str) -> Result:
    settings = tmp_path / "settings.yml"
    settings.write_text(json.dumps({"state_dir": str(tmp_path / "state")}))
    command, *rest = arguments
    return CliRunner().invoke(main, ["token", command, "--settings", str(settings), *rest])


def test_the_command_prints_the_token_alone_and_the_list_never_shows_it(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "--name", "ann", "--role", "operator")
    assert made.exit_code == 0
    token = made.stdout.strip()
    assert made.stdout == token + "\n"
    found = TokenStore(tmp_path / "state").find(token)
    assert found is not None
    assert found.role is Role.OPERATOR
    for listed in (run(tmp_path, "list"), run(tmp_path, "list", "--json")):
        assert "ann" in listed.stdout
        assert token not in listed.stdout
        assert found.digest not in listed.stdout


def test_the_command_revokes_by_name(tmp_path: Path) -> None:
    token = run(tmp_path, "create", "--name", "ann", "--role", "viewer").stdout.strip()
    assert run(tmp_path, "revoke", "ann").exit_code == 0
    assert TokenStore(tmp_path / "state").find(token) is None
    again = run(tmp_path, "revoke", "ann")
    assert (again.exit_code, again.stderr.count("\n")) == (78, 1)
    (line,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert line["revoked"]


def test_the_command_wants_a_role_that_exists(tmp_path: Path) -> None:
    assert run(tmp_path, "create", "--name", "ann", "--role", "root").exit_code == 2
    assert run(tmp_path, "create", "--name", "ann").exit_code == 2
