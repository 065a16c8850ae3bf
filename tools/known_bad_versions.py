"""Versions of our dependencies that must not be used, or may for a reason. Checked 2026-11-23.

Small on purpose: what a person read about and judged. pip-audit knows more, where it can ask.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownBad:
    """One problem.

    Attributes:
        package: normalised name.
        fixed: the first version without the problem.
        problem: its id and what it means.
        source: where that is written.
        accepted: why a version with the problem may be used here; empty: it may not.
    """

    package: str
    fixed: str
    problem: str
    source: str
    accepted: str = ""


KNOWN_BAD = (
    KnownBad(
        "paho-mqtt",
        "2.2.0",
        "#914: a download longer than the keepalive ends in an endless reconnect",
        "https://github.com/eclipse-paho/paho.mqtt.python/pull/923",
    ),
    KnownBad(
        "starlette",
        "0.49.1",
        "CVE-2025-62727: a Range header costs quadratic time in FileResponse, which serves blobs",
        "https://nvd.nist.gov/vuln/detail/CVE-2025-62727",
    ),
    KnownBad(
        "h11",
        "0.16.0",
        "CVE-2025-43859: malformed chunked bodies are accepted (request smuggling)",
        "https://nvd.nist.gov/vuln/detail/CVE-2025-43859",
    ),
    KnownBad(
        "pyarrow",
        "14.0.1",
        "CVE-2023-47248: reading an untrusted file can run code",
        "https://nvd.nist.gov/vuln/detail/CVE-2023-47248",
    ),
    KnownBad(
        "pyyaml",
        "5.4",
        "CVE-2020-14343: full_load can run code",
        "https://nvd.nist.gov/vuln/detail/CVE-2020-14343",
    ),
    KnownBad(
        "pydantic",
        "2.4.0",
        "CVE-2024-3772: a regular expression for e-mail addresses costs exponential time",
        "https://nvd.nist.gov/vuln/detail/CVE-2024-3772",
    ),
    KnownBad(
        "pynacl",
        "1.6.2",
        "CVE-2025-69277: the bundled libsodium accepts some points outside the main group",
        "https://github.com/pyca/pynacl/blob/main/CHANGELOG.rst",
        accepted="only Ed25519 signatures are used, never is_valid_point",
    ),
    KnownBad(
        "cryptography",
        "44.0.1",
        "CVE-2024-12797: the bundled OpenSSL's TLS with raw public keys",
        "https://nvd.nist.gov/vuln/detail/CVE-2024-12797",
        accepted="TLS is that of Python's ssl module; this package makes and reads certificates",
    ),
    KnownBad(
        "torch",
        "2.10.0",
        "CVE-2025-32434, CVE-2026-24747: torch.load can run code despite weights_only",
        "https://nvd.nist.gov/vuln/detail/CVE-2026-24747",
        accepted="nothing is ever unpickled, safetensors only; some boards have no newer torch",
    ),
    KnownBad(
        "transformers",
        "4.48.0",
        "CVE-2024-11392 to 11394: some model families unpickle what they load",
        "https://nvd.nist.gov/vuln/detail/CVE-2024-11392",
        accepted="other families, safetensors only; Python 3.8 on JetPack 5 has no newer one",
    ),
    KnownBad(
        "onnx",
        "1.21.0",
        "CVE-2026-27489, CVE-2026-34446: a foreign model can read files beside it",
        "https://nvd.nist.gov/vuln/detail/CVE-2026-27489",
        accepted="only models that this program has just exported are loaded",
    ),
    KnownBad(
        "jinja2",
        "3.1.6",
        "CVE-2025-27516: a template can leave the sandbox",
        "https://nvd.nist.gov/vuln/detail/CVE-2025-27516",
        accepted="the only templates are those of our own Ansible roles",
    ),
)

LICENCE_EXCEPTIONS = {
    "ansible-core": "GPL-3.0: a program that the operator runs; not imported, not shipped",
    "ansible-lint": "GPL-3.0: a tool of the developers",
    "ansible-compat": "comes with ansible-lint",
    "yamllint": "GPL-3.0: a tool of the developers",
    "psycopg": "LGPL-3.0: optional, a library used as it is and behind SQLAlchemy",
    "psycopg-binary": "comes with psycopg",
    "jetson-stats": "AGPL-3.0: optional, imported in one module behind an interface",
}
"""Packages whose licence would not do for something that we ship."""
