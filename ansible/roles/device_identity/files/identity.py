"""Looks at a device's identity, or makes its key and a signing request. Standard library only.

    identity.py look FOLDER            what is there, as JSON
    identity.py request FOLDER NAME    a request, PEM; makes the key if there is none
    identity.py new-request FOLDER NAME    the same, with another key

The key never leaves the device. Whose certificate is good is decided where the authority is: this
device's clock may be wrong.
"""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def openssl(*arguments: str) -> str:
    """What the program answers; empty where it refuses."""
    command = ["openssl", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def look(folder: Path) -> dict[str, str | bool]:
    """Whose certificate is there, which one, and whether it is for the key that is there."""
    key, certificate = str(folder / "device.key"), str(folder / "device.pem")
    serial = openssl("x509", "-in", certificate, "-noout", "-serial").removeprefix("serial=")
    subject = openssl("x509", "-in", certificate, "-noout", "-subject", "-nameopt", "RFC2253")
    of_key = openssl("pkey", "-in", key, "-pubout")
    of_certificate = openssl("x509", "-in", certificate, "-noout", "-pubkey")
    return {
        "serial": f"{int(serial, 16):x}" if serial else "",
        "name": subject.removeprefix("subject=").strip().removeprefix("CN="),
        "matches": bool(of_key) and of_key == of_certificate,
    }


def request(folder: Path, name: str, *, new_key: bool) -> str:
    """A signing request for the key of this device.

    Raises:
        CalledProcessError: openssl cannot make one.
    """
    owner = folder.parent.stat()
    os.umask(0o077)
    folder.mkdir(exist_ok=True)
    os.chown(folder, owner.st_uid, owner.st_gid)
    key = folder / "device.key"
    if new_key or not openssl("pkey", "-in", str(key), "-pubout"):
        made = folder / ".device.key.new"
        command = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(made)]
        subprocess.run(command, capture_output=True, check=True)
        os.chown(made, owner.st_uid, owner.st_gid)
        made.replace(key)
    command = ["openssl", "req", "-new", "-key", str(key), "-subj", f"/CN={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "look":
        sys.stdout.write(json.dumps(look(where)))
    else:
        sys.stdout.write(request(where, sys.argv[3], new_key=what == "new-request"))
