"""Several hosts on one machine: network namespaces, joined by links with a delay and a bandwidth.

Each host has the address 10.77.0.(k+1) on a tun device. All packets go through this process, which holds each of them for the
delay, and as long as the link is busy with those before it. That needs root, ``ip`` and ``/dev/net/tun``.
"""

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

TUN, NO_PACKET_INFO, SET_NAME = 0x1, 0x1000, 0x400454CA
LARGEST_PACKET = 60000
BUFFER = "4096 4194304 67108864"
"""Bytes that a socket may hold, as Linux takes them: least, at first, most. 10 MB a second over 400 ms are 4 MB."""


@dataclass(frozen=True)
class Wire:
    """The link between any two hosts.

    Attributes:
        delay: Seconds that a packet travels, one way.
        megabits: Millions of bits a second that one host sends; 0 for as many as it can.
    """

    delay: float = 0.0
    megabits: float = 0.0

    def __str__(self) -> str:
        speed = f", {self.megabits:g} Mbit/s" if self.megabits else ""
        return f"{self.delay * 1000:g} ms{speed}"


def missing() -> str:
    """Say why this machine can have no hosts; empty where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "it needs the command ip (iproute2)"
    if not os.path.exists("/dev/net/tun"):
        return "it needs the device /dev/net/tun"
    return ""


@contextmanager
def namespace(number: int) -> Iterator[tuple[str, int]]:
    """Make a host; return the name of its namespace, and the file through which its packets go."""
    name, device = f"dnifx-{os.getpid()}-{number}", f"d{os.getpid() % 1000000}{number}"
    inside = ("ip", "netns", "exec", name, "ip")
    with ExitStack() as stack:
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, file)
        fcntl.ioctl(file, SET_NAME, struct.pack("16sH", device.encode(), TUN | NO_PACKET_INFO))
        command("ip", "netns", "add", name)
        stack.callback(command, "ip", "netns", "del", name)
        command("ip", "link", "set", device, "netns", name)
        command(*inside, "link", "set", device, "name", "w0")
        command(*inside, "link", "set", "lo", "up")
        command(*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "w0")
        command(*inside, "link", "set", "w0", "mtu", str(LARGEST_PACKET), "txqueuelen", "10000", "up")
        for way in ("rmem", "wmem"):
            command("ip", "netns", "exec", name, "sh", "-c", f"echo {BUFFER} > /proc/sys/net/ipv4/tcp_{way}")
        yield name, file


def command(*words: str) -> None:
    """Run a command, and raise CalledProcessError with what it said where it fails."""
    subprocess.run(words, check=True, capture_output=True)


def run(words: Sequence[str], hosts: int, wire: Wire, environment: Mapping[str, str], patience: float) -> None:
    """Run a command on each host, as torchrun would, and carry the packets until all have ended.

    Args:
        words: The command. It finds its rank in the environment.
        hosts: How many hosts.
        wire: The link between them.
        environment: Further variables.
        patience: Seconds after which the run is given up.

    Raises:
        RuntimeError: A host failed, or was too slow.
    """
    joined = {
        "WORLD_SIZE": str(hosts),
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "w0",
        "TP_SOCKET_IFNAME": "w0",
    }
    with ExitStack() as stack:
        made = [stack.enter_context(namespace(number)) for number in range(hosts)]
        children = []
        for rank, (name, _) in enumerate(made):
            own = {**os.environ, **environment, **joined, "RANK": str(rank), "LOCAL_RANK": "0"}
            children.append(subprocess.Popen(("ip", "netns", "exec", name, *words), env=own))
            stack.callback(ended, children[-1])
        carrier, start = Carrier([file for _, file in made], wire), time.monotonic()
        while any(child.poll() is None for child in children):
            carrier.turn()
            if any(child.poll() for child in children) or time.monotonic() - start > patience:
                raise RuntimeError(
                    f"a host failed, or was slower than {patience} s: {[each.poll() for each in children]}"
                )


def ended(child: "subprocess.Popen[bytes]") -> None:
    """End a process that still runs."""
    with suppress(ProcessLookupError):
        child.kill()
    child.wait()


@dataclass
class Carrier:
    """Takes packets from hosts, holds them, and gives them to the hosts that they are for.

    Attributes:
        files: Each host's file.
        wire: The link.
    """

    files: Sequence[int]
    wire: Wire
    _held: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    _taken: int = 0
    _free: dict[int, float] = field(default_factory=dict)

    def turn(self) -> None:
        """Wait a little for packets, take them, and give those that are due."""
        wait = max(0.0, self._held[0][0] - time.perf_counter()) if self._held else 0.05
        ready, _, _ = select.select(self.files, [], [], min(wait, 0.05))
        for file in ready:
            self._take(file)
        now = time.perf_counter()
        while self._held and self._held[0][0] <= now:
            try:
                os.write(self.files[self._held[0][2]], self._held[0][3])
            except BlockingIOError:
                return
            heapq.heappop(self._held)

    def _take(self, file: int) -> None:
        now = time.perf_counter()
        for _ in range(64):
            try:
                packet = os.read(file, 65536)
            except BlockingIOError:
                return
            host = packet[19] - 1
            if packet[0] >> 4 != 4 or not 0 <= host < len(self.files):
                continue
            seconds = len(packet) * 8e-6 / self.wire.megabits if self.wire.megabits else 0.0
            self._free[file] = max(now, self._free.get(file, 0.0)) + seconds
            heapq.heappush(self._held, (self._free[file] + self.wire.delay, self._taken, host, packet))
            self._taken += 1
