"""``legend backup`` and ``legend doctor``: keeping a fleet's server in good health."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker_server.cli_output import as_json_option, print_answer
from wire_protocol.errors import ConfigError, ServerUnavailable

if TYPE_CHECKING:
    from broker_server.operator_cli import ServerAddress


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@as_json_option
@click.pass_obj
def backup(server: ServerAddress, file: Path, as_json: bool) -> None:
    """Save the server's state to FILE, while it runs and trains.

    Inside: database, blobs, results, counters, keys and certificates; keep it
    secret. Put it back with: broker-server restore FILE.
    """
    from broker_server.backup_archive import unpack
    from broker_server.backup_report import backup_lines

    with server.connect() as api:
        api.backup(file)
    try:
        manifest = unpack(file, None)
    except ConfigError as error:
        file.unlink(missing_ok=True)
        raise ServerUnavailable(f"the backup did not arrive whole, try again: {error}") from error
    lines = "\n".join(backup_lines(manifest, file))
    print_answer(manifest.model_dump(), lines, as_json=as_json)


@click.command()
@as_json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check server, broker, disk, certificates and every device.

    Says what to do about everything that is not well. Exit code 1 if something
    is broken; warnings alone are 0.
    """
    from broker_server.fleet_doctor import examine
    from broker_server.tables import findings_table

    server: ServerAddress = ctx.obj
    findings = examine(server.connect)
    rows = [finding.__dict__ for finding in findings]
    print_answer(rows, findings_table(rows), as_json=as_json)
    if any(finding.state == "broken" for finding in findings):
        ctx.exit(1)
