"""Exit 0 once a port presents the certificate that is in a file; otherwise says so.

Arguments: host, port, file. Standard library only.
"""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import ssl
import sys
from pathlib import Path


def presented(host: str, port: int) -> bytes:
    """The certificate that a client is shown there, DER; trusts it no further.

    The broker refuses us right after it, because we show none.
    """
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, port)))


if __name__ == "__main__":
    wanted = ssl.PEM_cert_to_DER_cert(Path(sys.argv[3]).read_text(encoding="ascii"))
    if presented(sys.argv[1], int(sys.argv[2])) != wanted:
        sys.exit(f"{sys.argv[1]}:{sys.argv[2]} does not present {sys.argv[3]} yet")
