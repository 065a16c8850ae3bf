"""Messages that only their author can have written, whatever carries them.

A signed message is JSON again, and its text stays readable:

    {"schema":"legend.signed/1","text":"<the message>","key":"<hex>","signature":"<hex>",
     "voucher":"..."}

The voucher says why the key is to be trusted: for the server's key a statement of the operator,
for a device's key its certificate. What is signed are the exact bytes of the text, so nothing has
to be brought into a canonical form.

Source: DSSE (sign bytes, not structures); TUF (an offline key that names the online one); RFC 8032.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire_protocol.errors import ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES

_CONTEXT = b"legend.signed/1\n"
"""Put before every text: a signature made for something else is never one of ours."""

KeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SignatureHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class SignedMessage(BaseModel):
    """The parts of a signed message; nothing is verified yet.

    Attributes:
        text: the message itself.
        key: Ed25519 public key that claims to have signed it.
        signature: over the text.
        voucher: why the key is to be trusted.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_name: Literal["legend.signed/1"] = Field("legend.signed/1", alias="schema")
    text: str
    key: KeyHex
    signature: SignatureHex
    voucher: str = ""


class ServerKeyStatement(BaseModel):
    """The operator's word that a key speaks for the server of a fleet.

    ``number`` grows with every new server key; devices refuse lower ones than they have seen.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_name: Literal["legend.server-key/1"] = Field("legend.server-key/1", alias="schema")
    fleet: str
    server_key: KeyHex
    number: int = Field(ge=1, le=2**53)


@dataclass(frozen=True)
class Signer:
    """A private key and the voucher that goes with what it signs.

    Attributes:
        seed: 32 bytes, the private key.
        voucher: put beside every signature.
    """

    seed: bytes
    voucher: str = ""

    def __repr__(self) -> str:
        return f"Signer({self.public_key})"

    @property
    def public_key(self) -> str:
        """64 hex digits."""
        return bytes(SigningKey(self.seed).verify_key).hex()

    def sign(self, data: bytes) -> bytes:
        """Wrap a message; ``data`` is UTF-8.

        Raises:
            ProtocolError: it becomes larger than ``MAX_WIRE_BYTES``.
        """
        key = SigningKey(self.seed)
        wrapped = (
            SignedMessage(
                text=data.decode(),
                key=bytes(key.verify_key).hex(),
                signature=key.sign(_CONTEXT + data).signature.hex(),
                voucher=self.voucher,
            )
            .model_dump_json(by_alias=True)
            .encode()
        )
        if len(wrapped) > MAX_WIRE_BYTES:
            raise ProtocolError(f"signed message of {len(wrapped)} bytes exceeds {MAX_WIRE_BYTES}")
        return wrapped


def read_signed(data: bytes) -> SignedMessage:
    """Read the parts of a signed message and check that its key signed its text.

    Whether that key may speak is for the caller to find out, by the voucher.

    Raises:
        ProtocolError: not signed, or the signature is not that of the key over the text.
    """
    if len(data) > MAX_WIRE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MAX_WIRE_BYTES}")
    try:
        message = SignedMessage.model_validate_json(data)
    except ValidationError as error:
        raise ProtocolError("the message is not signed") from error
    check_signature(message.key, message.text.encode(), message.signature)
    return message


def check_signature(key: str, text: bytes, signature: str) -> None:
    """Check one signature made by ``Signer.sign`` or ``sign_statement``.

    Raises:
        ProtocolError: it is wrong.
    """
    try:
        VerifyKey(bytes.fromhex(key)).verify(_CONTEXT + text, bytes.fromhex(signature))
    except (BadSignatureError, ValueError, TypeError, binascii.Error) as error:
        raise ProtocolError("the signature is wrong") from error


def sign_statement(statement: ServerKeyStatement, operator: Signer) -> str:
    """The voucher for a server's key, signed by the operator."""
    return operator.sign(statement.model_dump_json(by_alias=True).encode()).decode()


def read_statement(voucher: str, *, operator_key: str) -> ServerKeyStatement:
    """Check a voucher of a server's key; the inverse of ``sign_statement``.

    Raises:
        ProtocolError: the operator did not sign it.
    """
    signed = read_signed(voucher.encode())
    if signed.key != operator_key:
        raise ProtocolError("the server's key is not signed by this fleet's operator")
    try:
        return ServerKeyStatement.model_validate_json(signed.text)
    except ValidationError as error:
        raise ProtocolError("the operator's statement is not understood") from error


def new_seed(random_bytes: Callable[[int], bytes]) -> bytes:
    """A new private key from a source of secret randomness such as ``secrets.token_bytes``."""
    return random_bytes(32)
