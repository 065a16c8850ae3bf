"""The server's signing key, and the operator's word for it.

The operator key says which server key speaks for the fleet; devices know the operator key. It may
lie elsewhere: the server only needs the statement that it signed. On a server without one, both
are made at the first start.

    <folder>/operator.key          seed of the operator key, hex; may be kept elsewhere
    <folder>/server-signing.json   seed of the server's key, and the operator's statement

In a fleet with certificates the folder is that of its authority, which made the operator key.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from wire_protocol.durable import write_durably
from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.signed import (
    ServerKeyStatement,
    Signer,
    new_seed,
    read_signed,
    read_statement,
    sign_statement,
)

OPERATOR_KEY = "operator.key"
OPERATOR_PUBLIC_KEY = "operator.pub"
SERVER_KEY = "server-signing.json"


@dataclass(frozen=True)
class SigningKeys:
    """What the server signs with.

    Attributes:
        server: signs commands; its voucher is the operator's statement.
        operator_key: public key in hex that devices must know.
        number: of the server's key.
    """

    server: Signer
    operator_key: str
    number: int


def load_or_make(folder: Path, fleet: str) -> SigningKeys:
    """Read the keys; make those that are missing.

    Raises:
        ConfigError: a file is damaged, for another fleet, or the operator key is needed and is
            not here.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder / SERVER_KEY).exists():
        return _load(folder / SERVER_KEY, fleet)
    if not (folder / OPERATOR_KEY).exists():
        if (folder / OPERATOR_PUBLIC_KEY).exists():
            raise ConfigError(
                f"{folder} has no signing key yet and the operator key is kept elsewhere; make one "
                "with it: broker-server signing-key renew --operator-key FILE"
            )
        _write_secret(folder / OPERATOR_KEY, new_seed(secrets.token_bytes).hex())
    return renew(folder, fleet, operator_key_file=folder / OPERATOR_KEY)


def renew(folder: Path, fleet: str, *, operator_key_file: Path) -> SigningKeys:
    """Replace the server's key by a new one, vouched for by the operator.

    Devices that have heard the new key refuse the old one. Its number follows the one of before,
    and is no lower than the time in seconds: where the old key is lost, the new one is newer too.

    Raises:
        ConfigError: the operator key cannot be read.
    """
    operator = Signer(_seed_in(operator_key_file))
    path = folder / SERVER_KEY
    before = _load(path, fleet).number if path.exists() else 0
    number = max(before + 1, int(time.time()))
    seed = new_seed(secrets.token_bytes)
    statement = ServerKeyStatement(fleet=fleet, server_key=Signer(seed).public_key, number=number)
    content = {"seed": seed.hex(), "voucher": sign_statement(statement, operator)}
    _write_secret(path, json.dumps(content))
    return _load(path, fleet)


def _load(path: Path, fleet: str) -> SigningKeys:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        signer = Signer(bytes.fromhex(content["seed"]), content["voucher"])
        operator_key = read_signed(signer.voucher.encode()).key
        statement = read_statement(signer.voucher, operator_key=operator_key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ProtocolError) as error:
        raise ConfigError(
            f"the signing key {path} is damaged; restore it from a backup, or delete it to make "
            "a new one with the operator key"
        ) from error
    if statement.server_key != signer.public_key:
        raise ConfigError(f"{path}: the operator's statement is about another key")
    if statement.fleet != fleet:
        raise ConfigError(f"{path} is for fleet {statement.fleet!r}, this server leads {fleet!r}")
    return SigningKeys(signer, operator_key, statement.number)


def _seed_in(path: Path) -> bytes:
    try:
        seed = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except FileNotFoundError as error:
        raise ConfigError(
            f"the operator key {path} is not here; bring it, or name it with --operator-key"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the operator key {path} cannot be read: {error}") from error
    if len(seed) != 32:
        raise ConfigError(f"the operator key {path} is not 64 hex digits")
    return seed


def _write_secret(path: Path, text: str) -> None:
    write_durably(path, text.encode() + b"\n", site="server.signing_key")
