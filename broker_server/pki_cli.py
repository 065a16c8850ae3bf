"""``broker-server pki``: the fleet's certificates, on the machine where the authority's key is.

A running server takes into use within seconds what these commands change.
"""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from broker_server.token_cli import settings_option
from wire_protocol.errors import ConfigError, ProtocolError

if TYPE_CHECKING:
    from broker_server.pki import FleetPki
    from broker_server.pki_ledger import IssuedCertificate

folder_option = click.option(
    "--pki",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the certificates. Default: the setting 'pki', or 'pki' in 'state_dir'.",
)
host_option = click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="Name or address where clients reach it; may be repeated. Loopback always works.",
)


@click.group()
def pki() -> None:
    """Certificates: make the fleet's authority, issue, revoke, renew, let devices enrol."""


@pki.command()
@settings_option
@folder_option
@host_option
@click.option("--fleet", help="Default: the setting 'fleet'.")
def init(
    settings_file: Path | None, folder: Path | None, hosts: tuple[str, ...], fleet: str | None
) -> None:
    """Make an authority, the operator's key, and certificates of server and broker.

    Run again, it makes only what is missing.
    """
    from broker_server.pki import FleetPki

    chosen, configured_fleet = _configured(settings_file, folder)
    made = FleetPki.create(chosen, fleet or configured_fleet, hosts, time.time())
    click.echo(f"folder        {made.folder}")
    click.echo(f"fleet         {made.fleet}")
    click.echo(f"authority     {made.ca_fingerprint}")
    click.echo(f"operator key  {made.operator_public_key}")
    click.echo(f"next          set 'pki: {made.folder}' in the settings of the server")


@pki.command()
@settings_option
@folder_option
@host_option
@click.argument("name", required=False)
@click.option("--csr", type=click.File("r"), help="Signing request of device NAME; - reads stdin.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write. Default: stdout.")
@click.option("--server", "service", flag_value="server", help="For this server, at --host.")
@click.option("--broker", "service", flag_value="broker", help="For the broker, at --host.")
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=90,
    show_default=True,
    help="How long a device's certificate is valid.",
)
def issue(
    settings_file: Path | None,
    folder: Path | None,
    hosts: tuple[str, ...],
    name: str | None,
    csr: IO[str] | None,
    out: Path | None,
    service: Any,
    days: int,
) -> None:
    """Issue a certificate: of device NAME from its --csr, or of --server or --broker.

    Its key is kept; delete server.key or broker.key first for a new one.
    """
    opened = _opened(settings_file, folder)
    if service is not None:
        if name is not None or csr is not None or out is not None or days != 90:
            raise click.UsageError(f"--{service} goes with --host only")
        _tell(opened.issue_service(service, hosts, time.time()), opened)
        return
    if name is None or csr is None:
        raise click.UsageError("give NAME and --csr FILE, or --server, or --broker")
    if hosts:
        raise click.UsageError("a device has no --host: it only connects")
    from broker_server.pki_x509 import DAY_S, LARGEST_PEM_BYTES

    text = _text_of(csr, LARGEST_PEM_BYTES + 1)
    issued = opened.issue_device(name, text, time.time(), lifetime_s=days * DAY_S)
    if out is None:
        click.echo(issued.pem, nl=False)
    else:
        from broker_server.pki_folder import PUBLIC, replace_file

        replace_file(out, issued.pem, site="server.pki_certificate", mode=PUBLIC)
        _tell(issued, opened)


@pki.command()
@settings_option
@folder_option
@click.option("--server", "services", flag_value="server", multiple=True, help="Only the server's.")
@click.option("--broker", "services", flag_value="broker", multiple=True, help="Only the broker's.")
def renew(settings_file: Path | None, folder: Path | None, services: tuple[Any, ...]) -> None:
    """Renew the certificates of server and broker, for the same hosts and keys.

    A running server does that itself after two thirds of their life.
    """
    opened = _opened(settings_file, folder)
    for service in services or ("server", "broker"):
        _tell(opened.renew_service(service, time.time()), opened)


@pki.command()
@settings_option
@folder_option
@click.argument("name_or_serial")
def revoke(settings_file: Path | None, folder: Path | None, name_or_serial: str) -> None:
    """Revoke every certificate of a device, or the one with this serial.

    A running server refuses it at once and ends its session at the broker.
    """
    revoked = _opened(settings_file, folder).revoke(name_or_serial, time.time())
    for issued in revoked:
        click.echo(f"revoked {issued.name} {issued.serial:x}")
    if not revoked:
        click.echo(f"{name_or_serial} was revoked before")


@pki.command("list")
@settings_option
@folder_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def list_certificates(settings_file: Path | None, folder: Path | None, as_json: bool) -> None:
    """List the certificates that were issued here, oldest first."""
    from wire_protocol.command_line import echo_json

    now = time.time()
    records = _opened(settings_file, folder).records()
    lines = [
        {
            "name": record.name,
            "kind": record.kind,
            "state": _state(record, now),
            "not_after": _when(record.not_after),
            "revoked_at": None if record.revoked_at is None else _when(record.revoked_at),
            "serial": f"{record.serial:x}",
        }
        for record in records
    ]
    if as_json:
        echo_json(lines)
        return
    for line in lines:
        click.echo(
            f"{line['name']:24} {line['kind']:8} {line['state']:8} "
            f"until {line['not_after']}  {line['serial']}"
        )


@pki.command()
@settings_option
@folder_option
@click.option("--device", metavar="NAME", help="The only device that may use it; accepted at once.")
@click.option(
    "--ttl-s",
    type=click.FloatRange(min=1, max=31_536_000),
    default=86_400,
    show_default=True,
    help="Seconds in which it must be used.",
)
def token(
    settings_file: Path | None, folder: Path | None, device: str | None, ttl_s: float
) -> None:
    """Print a token with which one device may enrol, once.

    It is shown this once and kept as a digest only. Without --device somebody must accept the
    device that used it: legend devices accept NAME.
    """
    opened = _opened(settings_file, folder)
    try:
        click.echo(opened.create_token(time.time(), device_id=device, ttl_s=ttl_s))
    except ProtocolError as error:
        raise ConfigError(str(error)) from error


def _opened(settings_file: Path | None, folder: Path | None) -> FleetPki:
    from broker_server.pki import FleetPki

    return FleetPki(_configured(settings_file, folder)[0])


def _configured(settings_file: Path | None, folder: Path | None) -> tuple[Path, str]:
    from broker_server.settings import load_settings

    settings = load_settings(settings_file)
    return folder or settings.pki or settings.state_dir / "pki", settings.fleet


def _text_of(file: IO[str], most: int) -> str:
    try:
        return file.read(most)
    except UnicodeDecodeError:
        # No text, so no request either: the reader of requests says so.
        return ""


def _tell(issued: IssuedCertificate, opened: FleetPki) -> None:
    until = _when(issued.not_after)
    click.echo(f"issued {issued.name} {issued.serial:x}, valid until {until}, in {opened.folder}")


def _state(record: IssuedCertificate, now: float) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if now >= record.not_after else "valid"


def _when(seconds: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
