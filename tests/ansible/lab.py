"""Throw-away hosts for provisioning tests: systemd as PID 1, sshd, an address, memory limits.

Each host is a ``systemd-nspawn`` container over an overlay on one debootstrapped base, on a private
bridge, in a cgroup of its own that is as large as the board it pretends to be. It can be rebooted,
and its power be cut. What this cannot show: ARM, a GPU, a real JetPack, another kernel, cgroup v2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

BRIDGE = "legendlab0"
NETWORK = "10.78.0"
CGROUPS = Path("/sys/fs/cgroup")
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
PATHS = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
PROGRAMS = ("systemd-nspawn", "debootstrap", "ip", "iptables", "ssh-keygen", "nsenter")
PACKAGES = (
    "systemd,systemd-sysv,dbus,openssh-server,python3,python3-venv,python3-apt,sudo,"
    "iproute2,ca-certificates,procps,kmod"
)
NOT_IN_A_CONTAINER = (
    *("systemd-networkd.service", "systemd-networkd.socket", "systemd-resolved.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer"),
)
NVPMODEL_CONF = """\
< POWER_MODEL ID=0 NAME=MAXN >
< POWER_MODEL ID=1 NAME=15W >
< POWER_MODEL ID=2 NAME=30W >
< PM_CONFIG DEFAULT=2 >
"""
FAKE_NVPMODEL = """\
#!/bin/sh
# Stands in for NVIDIA's program: records the mode where the board's own would.
mkdir -p /opt/fake-board/var/lib/nvpmodel
printf 'pmode:%04d fmode:fanNull\\n' "$2" >/opt/fake-board/var/lib/nvpmodel/status
"""


def what_is_missing() -> str:
    """Why hosts cannot be booted here; empty if they can."""
    if os.getuid() != 0:
        return "the lab needs root"
    if not (CGROUPS / "memory/memory.limit_in_bytes").exists():
        return "the lab needs the memory controller of cgroup v1"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"the lab needs {', '.join(missing)} (apt install debootstrap systemd-container)"
    apart = ("unshare", "--mount", "--net", "--pid", "--fork", "true")
    if subprocess.run(apart, check=False, capture_output=True).returncode:
        return "the lab needs the right to make namespaces"
    return ""


@dataclass(frozen=True)
class Host:
    """One host to boot.

    Attributes:
        name: at most 12 characters; its host name.
        memory_bytes: size of its cgroup, and what its ``meminfo`` says if it has a board.
        cpus: how many processors' worth of time it gets; 0 means all.
        model: text of its device tree; empty means an ordinary computer.
        l4t: first line of ``/etc/nv_tegra_release``; empty off Jetson.
    """

    name: str
    memory_bytes: int
    cpus: float = 0.0
    model: str = ""
    l4t: str = ""


@dataclass
class Lab:
    """Boots hosts and takes everything away again.

    Args:
        folder: the base and the hosts live here; the base is kept.
        wheels: a folder that is every host's package index, in place of the network's.
    """

    folder: Path
    wheels: Path | None = None
    _nspawn: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _leaders: dict[str, int] = field(default_factory=dict)
    _hosts: list[Host] = field(default_factory=list)
    _opened: bool = False
    _forwarded: bool = True

    @property
    def base(self) -> Path:
        """The system that every host starts from."""
        return self.folder / "base-bookworm"

    @property
    def key(self) -> Path:
        """The private key that every host lets in."""
        return self.folder / "id_ed25519"

    def address(self, name: str) -> str:
        """Where a host is."""
        return f"{NETWORK}.{11 + [host.name for host in self._hosts].index(name)}"

    def start(self, hosts: list[Host]) -> None:
        """Boot hosts and wait until each lets us in.

        Raises:
            RuntimeError: another lab runs on this machine, or one was not taken down.
            TimeoutError: a host did not come up.
        """
        if Path(f"/sys/class/net/{BRIDGE}").exists():
            raise RuntimeError(f"another lab runs; if none does: ip link del {BRIDGE}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._build_base()
        if not self.key.exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        self._open_network()
        self._hosts = hosts
        for host in hosts:
            self._boot(host)
        for host in hosts:
            _until(lambda name=host.name: self._lets_us_in(name), f"{host.name} answers")  # type: ignore[misc]

    def stop(self) -> None:
        """Power off, unmount, and remove everything but the base."""
        if not self._opened:
            return
        for nspawn in self._nspawn.values():
            nspawn.terminate()
        for name in self._nspawn:
            self._wait_until_off(name)
            subprocess.run(["umount", str(self.root(name))], check=False)
        parents = [group.parent for host in self._hosts for group in _groups(host.name)]
        _until(lambda: all(map(_removed, parents)), "the lab's cgroups are gone")
        self._close_network()
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def reboot(self, name: str) -> None:
        """Reboot a host in order, and wait until it lets us in again."""
        self.execute(name, "systemctl", "reboot")
        self._power_on_again(name)

    def cut_power(self, name: str) -> None:
        """End everything on a host at once, boot it, and wait until it lets us in again."""
        os.kill(self._leaders[name], signal.SIGKILL)
        self._power_on_again(name)

    def inventory(self, groups: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
        """An inventory of these hosts: group, host, host variables."""
        arguments = (
            "-o StrictHostKeyChecking=accept-new -o LogLevel=ERROR "
            f"-o UserKnownHostsFile={self.folder / 'run' / 'known_hosts'}"
        )
        login = {
            "ansible_user": "ansible",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": arguments,
        }
        content: dict[str, object] = {"all": {"vars": login}}
        for group, hosts in groups.items():
            content[group] = {
                "hosts": {
                    name: {"ansible_host": self.address(name), **values}
                    for name, values in hosts.items()
                }
            }
        return content

    def write_inventory(self, content: dict[str, object]) -> Path:
        """Put an inventory where ``ansible-playbook -i`` finds it."""
        path = self.folder / "run" / "inventory.yml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def execute(self, name: str, *command: str) -> str:
        """Run a command inside a host, without ssh; its output, stripped."""
        answer = self.call(name, *command)
        return (answer.stdout + answer.stderr).strip()

    def call(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """The same; how it ended, too. Nothing of this machine's environment gets in."""
        inside = ["nsenter", "-t", str(self._leaders[name]), "-a", "--", *command]
        return subprocess.run(inside, env=PATHS, capture_output=True, text=True, check=False)

    def root(self, name: str) -> Path:
        """The files of a host that runs, seen from here."""
        return self.folder / "run" / name / "root"

    def _build_base(self) -> None:
        if self.base.exists():
            return
        partial = self.base.with_suffix(".part")
        _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(partial))
        (partial / "etc/machine-id").write_text("")
        for unit in NOT_IN_A_CONTAINER:
            (partial / "etc/systemd/system" / unit).symlink_to("/dev/null")
        for key in (partial / "etc/ssh").glob("ssh_host_*"):
            key.unlink()
        _run("chroot", str(partial), "useradd", "-m", "-s", "/bin/bash", "ansible")
        sudo = partial / "etc/sudoers.d/ansible"
        sudo.write_text("ansible ALL=(ALL) NOPASSWD:ALL\n")
        sudo.chmod(0o440)
        partial.rename(self.base)

    def _open_network(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._opened = True
        _run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        self._forwarded = FORWARD.read_text().strip() == "1"
        FORWARD.write_text("1\n")
        _run("iptables", "-t", "nat", "-A", *_masquerade())

    def _close_network(self) -> None:
        subprocess.run(["iptables", "-t", "nat", "-D", *_masquerade()], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)
        if not self._forwarded:
            FORWARD.write_text("0\n")

    def _boot(self, host: Host) -> None:
        folder, root = self.folder / "run" / host.name, self.root(host.name)
        upper = folder / "upper"
        for path in (upper, folder / "work", root):
            path.mkdir(parents=True)
        self._prepare(host, upper)
        layers = f"lowerdir={self.base},upperdir={upper},workdir={folder / 'work'}"
        _run("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
        self._power_on(host)

    def _power_on_again(self, name: str) -> None:
        self._wait_until_off(name)
        self._power_on(next(host for host in self._hosts if host.name == name))
        _until(lambda: self._lets_us_in(name), f"{name} answers")

    def _wait_until_off(self, name: str) -> None:
        nspawn = self._nspawn[name]
        try:
            nspawn.wait(60)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait(20)
        _until(lambda: all(map(_removed, _groups(name))), f"the cgroups of {name} are gone")

    def _power_on(self, host: Host) -> None:
        for group in _groups(host.name):
            group.mkdir(parents=True, exist_ok=True)
            if group.is_relative_to(CGROUPS / "cpuset"):
                for level in (group.parent, group):
                    for file in ("cpuset.cpus", "cpuset.mems"):
                        (level / file).write_text((CGROUPS / "cpuset" / file).read_text())
        limit = CGROUPS / "memory/legendlab" / host.name / "memory.limit_in_bytes"
        limit.write_text(str(host.memory_bytes))
        if host.cpus:
            quota = CGROUPS / "cpu/legendlab" / host.name / "cpu.cfs_quota_us"
            quota.write_text(str(int(host.cpus * 100_000)))
        groups = " ".join(map(str, _groups(host.name)))
        enter = f'for group in {groups}; do echo $$ >"$group/cgroup.procs"; done; exec "$@"'
        root = str(self.root(host.name))
        nspawn = ["systemd-nspawn", "--quiet", "-D", root, f"--machine={host.name}", "--boot"]
        nspawn += ["--register=no", "--keep-unit", f"--network-bridge={BRIDGE}"]
        nspawn += ["--resolv-conf=off", "--timezone=off", "--link-journal=no"]
        nspawn += ["--system-call-filter=@keyring bpf", "--kill-signal=SIGRTMIN+3"]
        nspawn += [f"--bind-ro={self.wheels}:/srv/wheels"] if self.wheels else []
        with (self.folder / "run" / host.name / "console.log").open("ab") as console:
            self._nspawn[host.name] = subprocess.Popen(
                ["sh", "-c", enter, "sh", *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._leaders[host.name] = self._wait_for_systemd(host.name)
        self._finish_boot(host.name)

    def _prepare(self, host: Host, upper: Path) -> None:
        address = self.address(host.name)
        files = {
            "etc/hostname": f"{host.name}\n",
            "etc/hosts": f"127.0.0.1 localhost\n{address} {host.name}\n",
            "etc/resolv.conf": Path("/etc/resolv.conf").read_text(),
            "home/ansible/.ssh/authorized_keys": self.key.with_suffix(".pub").read_text(),
        }
        if self.wheels:
            files["etc/pip.conf"] = "[global]\nno-index = true\nfind-links = /srv/wheels\n"
        if host.model:
            files["opt/fake-board/proc/device-tree/model"] = host.model + "\0"
            files["opt/fake-board/proc/meminfo"] = (
                f"MemTotal: {host.memory_bytes // 1024} kB\n"
                f"MemAvailable: {host.memory_bytes * 8 // 10240} kB\n"
            )
        if "Raspberry" in host.model:
            files["boot/firmware/cmdline.txt"] = "console=tty1 root=PARTUUID=0-02 rootwait\n"
        if host.l4t:
            files["opt/fake-board/etc/nv_tegra_release"] = host.l4t + "\n"
            files["opt/fake-board/etc/nvpmodel.conf"] = NVPMODEL_CONF
            files["usr/sbin/nvpmodel"] = FAKE_NVPMODEL
        for name, text in files.items():
            path = upper / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if host.l4t:
            (upper / "usr/sbin/nvpmodel").chmod(0o755)
        # Limits are real, whatever board the host pretends to be.
        for name in ("proc/self", "sys/fs/cgroup"):
            link = upper / "opt/fake-board" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/{name}")
        (upper / "etc/ssh").mkdir()
        key = upper / "etc/ssh/ssh_host_ed25519_key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(key))
        _run("chown", "-R", "1000:1000", str(upper / "home/ansible"))
        (upper / "home/ansible/.ssh").chmod(0o700)

    def _wait_for_systemd(self, name: str) -> int:
        pid = self._nspawn[name].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        _until(
            lambda: any(
                Path(f"/proc/{pid}/root/run/systemd/private").exists()
                for pid in children.read_text().split()
            ),
            f"systemd of {name} runs",
        )
        return int(children.read_text().split()[0])

    def _finish_boot(self, name: str) -> None:
        # nspawn mounts v1 controllers read-only, and systemd then accepts limits without enforcing
        # them. It looks once, at its start: hence the daemon-reexec.
        remount = "; ".join(
            f"mount -o remount,rw,bind /sys/fs/cgroup/{controller}" for controller in CONTROLLERS
        )
        leader = str(self._leaders[name])
        subprocess.run(
            ["nsenter", "-t", leader, "-m", "--", "sh", "-c", remount],
            check=False,
            stderr=subprocess.DEVNULL,
        )
        _until(
            lambda: self.execute(name, "systemctl", "daemon-reexec") == "", f"{name} takes limits"
        )
        network = (
            f"ip link set lo up; ip addr replace {self.address(name)}/24 dev host0; "
            f"ip link set host0 up; ip route replace default via {NETWORK}.1"
        )
        _run("nsenter", "-t", leader, "-n", "--", "sh", "-c", network)

    def _lets_us_in(self, name: str) -> bool:
        options = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]
        options += ["-o", f"UserKnownHostsFile={self.folder / 'run' / 'known_hosts'}"]
        options += ["-o", "ConnectTimeout=2", "-o", "LogLevel=ERROR", "-i", str(self.key)]
        command = ["ssh", *options, f"ansible@{self.address(name)}", "true"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _groups(name: str) -> list[Path]:
    hierarchies = [CGROUPS / controller for controller in (*CONTROLLERS, "systemd", "unified")]
    return [path / "legendlab" / name for path in hierarchies if path.is_dir()]


def _removed(group: Path) -> bool:
    """Remove a cgroup and those below it, deepest first; False while something lives in one."""
    try:
        for path in sorted(group.rglob("*/"), reverse=True):
            path.rmdir()
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _masquerade() -> list[str]:
    return ["POSTROUTING", "-s", f"{NETWORK}.0/24", "!", "-o", BRIDGE, "-j", "MASQUERADE"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _until(done: Callable[[], bool], what: str, *, patience_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"gave up waiting until {what}")
        time.sleep(0.1)
