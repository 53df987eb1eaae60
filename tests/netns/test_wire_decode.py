"""What is on the wire while pods talk, in the eyes of Wireshark's dissectors."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from forwarder.demo.features import switch_off
from forwarder.demo.lab import VNI, Lab, popen
from forwarder.demo.probes import Station, ping, transfer, udp_echo
from tests.netns.foreign import NO_CHECKSUM_OFFLOAD
from tests.netns.labs import new_lab

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

PORT = {"geneve": 6081, "vxlan": 4789}
CHECKSUMS = ("ip.checksum.status", "udp.checksum.status", "tcp.checksum.status", "icmp.checksum.status")
VERIFY = [f"{protocol}.check_checksum:TRUE" for protocol in ("ip", "udp", "tcp")]
LAYERS = {"frame", "eth", "ethertype", "arp", "ip", "ipv6", "icmp", "icmpv6", "udp", "tcp", "geneve", "vxlan"}
LAYERS |= {"data", "_ws.malformed", "_ws.expert"}
"""All that is dissected. What pods say to each other is random here, and looks now and then like a broken
message of some other protocol."""

PROBES = "eth.type == 0x88b5"
"""Of the nodes' own, between the pods' packets."""

BAD, GOOD = "0", "1"
HEADER = {
    "geneve": {
        "geneve.version": "0",
        "geneve.flags": "0x00",
        "geneve.proto_type": "0x6558",
        "geneve.vni": f"{VNI:#08x}",
        "geneve.reserved": "0x00",
        "geneve.options": "",
    },
    "vxlan": {
        "vxlan.flags": "0x0800",
        "vxlan.gbp": "0",
        "vxlan.vni": str(VNI),
        "vxlan.reserved8": "0",
    },
}
"""RFC 8926 section 3.4 and RFC 7348 section 5: what every datagram of ours says, no more."""


@pytest.mark.parametrize("underlay", ["ipv4", "ipv6"])
@pytest.mark.parametrize("encapsulation", ["geneve", "vxlan"])
def test_dissectors_agree(tmp_path: Path, encapsulation: str, underlay: str) -> None:
    missing = [program for program in ("tcpdump", "tshark") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} absent: how others decode us is NOT tested in this run")
    capture = tmp_path / "wire.pcap"
    with new_lab(encapsulation, underlay) as lab:
        nodes = [lab.add_node(), lab.add_node()]
        for node in nodes:
            # A veth leaves outer checksums unfinished; here they are to be verified as well.
            switch_off(node.namespace, "eth0", *NO_CHECKSUM_OFFLOAD)
        lab.start()
        one, other = (
            Station(pod.name, pod.namespace, pod.ips)
            for pod in (lab.add_pod(node, f"p{node.index}") for node in nodes)
        )
        with captured(lab, capture):
            assert ping([(one, other), (other, one)]).lost == ()
            for address in other.ips:
                assert transfer(one, other, address, os.urandom(1 << 20)).hash_ok
                assert udp_echo(one, other, address, 2000, 2).fault is None

    ours = f"udp.dstport == {PORT[encapsulation]} and not {PROBES}"
    datagrams = dissect(capture, ours, *HEADER[encapsulation], "ip.flags.df", *CHECKSUMS)
    assert len(datagrams) > 1500  # 2 MiB in segments of at most 1450 bytes
    assert dissect(capture, f"{ours} and not {encapsulation}", "frame.number") == []
    assert dissect(capture, "_ws.malformed or _ws.expert.severity == error", "frame.number") == []
    verified = dict.fromkeys(CHECKSUMS, 0)
    for datagram in datagrams:
        said = {name: datagram[name] for name in HEADER[encapsulation]}
        assert said == HEADER[encapsulation]
        if underlay == "ipv4":
            assert datagram["ip.flags.df"].startswith("1")  # the outer packet is never fragmented
        for name in CHECKSUMS:
            statuses = datagram[name].split(",")
            assert BAD not in statuses, (name, datagram)
            verified[name] += statuses.count(GOOD)
    # Each datagram's outer UDP checksum at least was there and right.
    assert verified["udp.checksum.status"] >= len(datagrams)
    assert verified["tcp.checksum.status"] > 1500
    assert verified["icmp.checksum.status"] >= 4


@contextmanager
def captured(lab: Lab, file: Path) -> Iterator[None]:
    """What the first node sends and receives, in a file that is whole afterwards."""
    command = [
        "tcpdump",
        "-i",
        "n1",
        "-w",
        str(file),
        "-s",
        "2048",
        "-B",
        "16384",
        "--immediate-mode",
        "-Z",
        "root",
    ]
    with popen(lab.wire, command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            assert b"listening on" in process.stderr.readline()
            yield
        finally:
            process.terminate()
            said = process.communicate(timeout=10)[1]
        assert b"\n0 packets dropped by kernel" in said


@cache
def other_protocols() -> list[str]:
    """Those that Wireshark knows beside LAYERS."""
    known = subprocess.run(
        ["tshark", "-G", "protocols"], capture_output=True, text=True, check=True, timeout=60
    )
    names = {line.split("\t")[2] for line in known.stdout.splitlines()}
    assert names >= LAYERS
    return sorted(names - LAYERS)


def dissect(capture: Path, which: str, *fields: str) -> list[dict[str, str]]:
    """The named fields of the frames that match a display filter; several values of one joined by commas."""
    command = ["tshark", "-r", str(capture), "-Y", which, "-T", "fields", "-E", "separator=/t"]
    command += [word for preference in VERIFY for word in ("-o", preference)]
    command += [word for protocol in other_protocols() for word in ("--disable-protocol", protocol)]
    command += [word for field in fields for word in ("-e", field)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [dict(zip(fields, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]
