"""Synthetic device logs with the fault behind each line, for the demonstration.

Everything here is generated: no line comes from a real machine. Eight kinds of
fault speak through the same programs and share most of their words (``sshd``
reports full disks, ``thermald`` crashes, a sensor times out like a network
does), so that a few keywords do not decide. Devices differ in which faults
they see and in how their software words them; the held-out lines cover all.
Pure: takes a generator, returns rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TEMPLATES: dict[str, tuple[str, ...]] = {
    "disk": (
        "{prog}: cannot write {file}: no space left on device",
        "{prog}[{pid}]: write to {file} failed, {part} is full",
        "{dev}: {n} unrecoverable read errors at sector {big}",
        "{part} remounted read-only after journal error {n}",
        "{prog} gave up on {file}: input/output error",
        "only {n} inodes left on {part}, {prog} could not create {file}",
        "{dev}: wear level at {pct}%, spare blocks low",
        "{prog}: checksum of {file} does not match, block {big} damaged",
        "flushing {file} took {ms} ms, {dev} queue stalled",
        "{prog}: old logs on {part} removed, still {pct}% in use",
    ),
    "memory": (
        "{prog}[{pid}] killed, it asked for {mb} MB more than was available",
        "{prog}: cannot allocate {mb} MB, free pages low",
        "kernel reclaimed {n} pages, {prog} stalled for {ms} ms",
        "{prog}: resident size grew to {mb} MB within {n} hours",
        "swap on {dev} at {pct}%, {prog} slowed down",
        "invoked the killer, victim {prog} pid {pid} score {n}",
        "{prog}: buffer of {mb} MB refused, limit of its group reached",
        "{n} corrected bit flips in bank {n} since boot",
        "{prog} holds {mb} MB after closing {file}, leak suspected",
        "huge page request from {prog} denied, too fragmented",
    ),
    "thermal": (
        "{zone} at {hot} C, clock lowered to {mhz} MHz",
        "{prog}: {zone} above its trip point, {unit} slowed down",
        "fan at {rpm} rpm cannot hold {zone} below {hot} C",
        "critical: {zone} {hot} C, shutting down in {n} s",
        "{prog}[{pid}]: frequency limited to {mhz} MHz until {unit} cools",
        "{unit} heat warning, case vent blocked?",
        "{zone} rose {n} degrees in {n} minutes under {prog}",
        "{prog}: fan stalled, {rpm} rpm expected",
        "{unit} throttled {n} times this hour, {hot} C peak",
        "{zone} back under its limit, {unit} at {mhz} MHz again",
    ),
    "network": (
        "{prog}: no route to {host}, {iface} lost its carrier",
        "{iface}: link down, {n} resets since boot",
        "{prog}[{pid}]: {host} did not answer within {ms} ms",
        "{iface} signal {n} dBm too weak, roaming failed",
        "{prog}: name {host} could not be resolved",
        "{pct}% of packets to {host} lost on {iface}",
        "{prog}: lease on {iface} expired, no offer received",
        "connection of {prog} to {host} reset after {ms} ms",
        "{iface}: duplicate address {ip} detected",
        "{prog}: handshake with {host} timed out, {iface} saturated",
    ),
    "power": (
        "{rail} dropped to {mv} mV, {unit} slowed down",
        "under-voltage on {rail}, check the supply",
        "battery at {pct}%, shutting down in {n} s",
        "{prog}: running on backup supply for {n} minutes",
        "{unit} over-current, drawing {ma} mA on {rail}",
        "unexpected reset, {rail} was below {mv} mV",
        "{prog}[{pid}]: charger absent, {pct}% left",
        "{iface} hub switched off, port drew {ma} mA",
        "{rail} ripple of {mv} mV beyond its limit",
        "{prog}: brownout recorded {n} times since boot",
    ),
    "auth": (
        "{prog}: access for {user} from {ip} denied, wrong password",
        "{prog}[{pid}]: key of {user} refused by {host}",
        "{n} failed logins of {user} within {n} minutes, locked",
        "{prog}: certificate of {host} expired {n} days ago",
        "{user} is not allowed to run {prog}, incident reported",
        "{prog}: token for {host} rejected, renew it",
        "session of {user} closed, permission to read {file} denied",
        "{prog}: signature of {file} does not match a trusted key",
        "unknown user {user} tried {prog} from {ip}",
        "{prog}: {host} demands a second factor from {user}",
    ),
    "service-crash": (
        "{prog}[{pid}] ended with status {n}, restart scheduled",
        "{prog}: segmentation fault at {hex}, state written to {file}",
        "{prog} restarted {n} times within {n} minutes, giving up",
        "{prog}: watchdog not fed for {ms} ms, aborting",
        "unit {prog} entered failed state after signal {n}",
        "{prog}[{pid}]: unhandled exception in thread {n}",
        "{prog}: assertion failed at line {n}, stopping",
        "main process of {prog} exited, {n} helpers orphaned",
        "{prog} did not start within {ms} ms, marked failed",
        "{prog}: bad option in {file}, refusing to start",
    ),
    "sensor": (
        "{sens} returned {n} three times, reading looks frozen",
        "{sens} on bus {n} did not answer within {ms} ms",
        "{prog}: {sens} value {big} outside its plausible range",
        "{sens} drifts, {pct}% off its neighbours",
        "{prog}[{pid}]: no sample from {sens} for {n} minutes",
        "{sens}: checksum of frame {n} does not match",
        "calibration of {sens} expired {n} days ago",
        "{prog}: {sens} reads {hot} C but {zone} is cold",
        "{sens} lens dirty, {pct}% of samples dropped",
        "{prog}: {sens} identifier {hex} unknown on bus {n}",
    ),
}
"""Wordings by label; every ``{slot}`` is filled anew for each line."""

LABELS = tuple(sorted(TEMPLATES))

_TRAILERS = (
    "", "", " ({zone} {hot} C)", " ({part} {pct}% used)", " ({iface} up)", " ({rail} stable)",
    " ({mb} MB free)", " (user {user})", " ({sens} ok)", " ({dev} idle)",
)  # fmt: skip
"""What a status line adds whatever the fault is: words of the other labels."""

_WORDS: dict[str, tuple[str, ...]] = {
    "prog": (
        "sshd", "thermald", "smartd", "upsd", "wpa_supplicant", "dhcpcd", "mqtt-bridge",
        "sensor-hub", "telemetry", "cron", "journald", "updater", "oomd", "camera-feed",
        "modem-manager", "powerd",
    ),
    "file": (
        "/var/log/auth.log", "/var/log/thermal.csv", "/data/samples.db", "/etc/power.conf",
        "/var/lib/network/leases", "/var/memory.dump", "/var/log/syslog", "/data/camera.raw",
        "/etc/keys/device.pem", "/var/crash/core.gz",
    ),
    "part": ("/var", "/data", "/boot", "/home", "the root partition"),
    "dev": ("mmcblk0", "nvme0n1", "sda", "zram0", "mmcblk1"),
    "unit": ("cpu", "gpu", "modem", "camera", "npu"),
    "zone": ("soc-thermal", "board sensor", "cpu zone", "gpu zone", "pmic"),
    "iface": ("eth0", "wlan0", "wwan0", "usb0", "can0"),
    "host": ("gateway", "broker", "update-server", "ntp-pool", "auth-server", "sensor-gw"),
    "rail": ("rail 5V", "rail 3V3", "VDD_IN", "the usb supply", "rail 12V"),
    "user": ("admin", "pi", "operator", "backup", "sensor", "root"),
    "sens": (
        "humidity probe", "pressure gauge", "door contact", "flow meter", "vibration pickup",
        "light sensor", "current clamp", "outdoor thermometer",
    ),
}  # fmt: skip

_RANGES: dict[str, tuple[int, int]] = {
    "n": (2, 60), "pid": (200, 9999), "big": (10_000, 999_999), "pct": (3, 99),
    "ms": (150, 9000), "mb": (12, 3800), "hot": (68, 108), "mhz": (300, 1900),
    "rpm": (400, 4800), "mv": (180, 4790), "ma": (450, 2900),
}  # fmt: skip

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class LogLine:
    """One log line and the kind of fault behind it."""

    line: str
    label: str


@dataclass(frozen=True)
class DemoData:
    """What each device sees, and what nobody trains on."""

    devices: tuple[tuple[LogLine, ...], ...]
    held_out: tuple[LogLine, ...]


@dataclass(frozen=True)
class DemoDataOptions:
    """Sizes and skew of the generated data.

    Attributes:
        label_alpha: Dirichlet concentration of a device's label mix.
        template_share: part of the wordings of each label that a device knows.
    """

    devices: int = 4
    examples_per_device: int = 400
    held_out: int = 400
    label_alpha: float = 2.0
    template_share: float = 0.6


def generate(options: DemoDataOptions, *, seed: int) -> DemoData:
    """Make the data of a small fleet; equal arguments give equal data.

    No held-out line occurs on a device. Held-out labels are balanced.
    """
    generator = np.random.default_rng(seed)
    seen: set[str] = set()
    held_out = [
        _fresh_line(LABELS[row % len(LABELS)], wordings_of=_all_templates, seen=seen, rng=generator)
        for row in range(options.held_out)
    ]
    frozen = frozenset(seen)
    devices = tuple(
        tuple(_device_lines(options, taken=set(frozen), rng=generator))
        for _ in range(options.devices)
    )
    return DemoData(devices, tuple(held_out))


def as_tsv(lines: Sequence[LogLine]) -> str:
    """The lines as a file with the columns ``line`` and ``label``."""
    return "line\tlabel\n" + "".join(f"{one.line}\t{one.label}\n" for one in lines)


def _device_lines(
    options: DemoDataOptions, *, taken: set[str], rng: np.random.Generator
) -> list[LogLine]:
    known = {label: _known_templates(label, options.template_share, rng) for label in LABELS}
    mix = rng.dirichlet(np.full(len(LABELS), options.label_alpha))
    labels = rng.choice(len(LABELS), size=options.examples_per_device, p=mix)
    return [
        _fresh_line(LABELS[int(index)], wordings_of=known.__getitem__, seen=taken, rng=rng)
        for index in labels
    ]


def _all_templates(label: str) -> tuple[str, ...]:
    return TEMPLATES[label]


def _known_templates(label: str, share: float, rng: np.random.Generator) -> tuple[str, ...]:
    wordings = TEMPLATES[label]
    count = max(1, round(share * len(wordings)))
    chosen = rng.choice(len(wordings), size=count, replace=False)
    return tuple(wordings[int(index)] for index in chosen)


def _fresh_line(
    label: str,
    *,
    wordings_of: Callable[[str], tuple[str, ...]],
    seen: set[str],
    rng: np.random.Generator,
) -> LogLine:
    """Fill templates until a line comes out that was not seen before."""
    wordings = wordings_of(label)
    while True:
        template = wordings[int(rng.integers(len(wordings)))]
        line = _fill(template + _TRAILERS[int(rng.integers(len(_TRAILERS)))], rng)
        if line not in seen:
            seen.add(line)
            return LogLine(line, label)


def _fill(template: str, rng: np.random.Generator) -> str:
    return _SLOT.sub(lambda match: _slot_value(match.group(1), rng), template)


def _slot_value(slot: str, rng: np.random.Generator) -> str:
    if slot in _WORDS:
        words = _WORDS[slot]
        return words[int(rng.integers(len(words)))]
    if slot == "ip":
        return f"10.{rng.integers(256)}.{rng.integers(256)}.{rng.integers(1, 255)}"
    if slot == "hex":
        return f"0x{int(rng.integers(16**6)):06x}"
    low, high = _RANGES[slot]
    return str(int(rng.integers(low, high)))
