from hypothesis import example, given
from hypothesis import strategies as st

from fastpath.drops import DropReason
from fastpath.wire import geneve, vxlan
from tests.packets import build
from tests.reference import geneve as geneve_oracle
from tests.reference import vxlan as vxlan_oracle

VNI = st.integers(0, (1 << 24) - 1)

OPTION = st.builds(
    lambda data, words, kind, reserved: build.geneve_option(data, words=words, kind=kind, reserved=reserved),
    st.integers(0, 31).map(lambda words: bytes(words * 4)),
    st.none() | st.integers(0, 31),
    st.sampled_from([0x00, 0x01, 0x7F]) | st.integers(0, 255),
    st.integers(0, 7),
)
NEARLY_GENEVE = st.builds(
    lambda vni, options, words, **fields: build.geneve(
        vni, options=options[:252], option_words=words, **fields
    ),
    VNI,
    st.lists(OPTION, max_size=5).map(b"".join),
    st.none() | st.integers(0, 63),
    version=st.sampled_from([0, 0, 0, 1, 2, 3]),
    oam=st.booleans(),
    critical=st.booleans(),
    reserved_bits=st.integers(0, 63),
    reserved_byte=st.integers(0, 255),
    protocol=st.sampled_from([0x6558, 0x6558, 0x6558, 0x0800, 0x86DD]) | st.integers(0, 0xFFFF),
)


@given(st.binary(max_size=300) | NEARLY_GENEVE, st.binary(max_size=64), st.integers(0, 400))
@example(b"", b"", 0)
def test_geneve_equals_the_rfc(header: bytes, behind: bytes, cut: int) -> None:
    datagram = (header + behind)[: cut or None]
    faults, answer = geneve_oracle.faults(datagram), geneve.decode(datagram)
    if faults:
        assert isinstance(answer, DropReason)
        assert answer.name in faults
    else:
        assert answer == geneve_oracle.decode(datagram)


@given(
    st.binary(max_size=20)
    | st.builds(
        lambda vni, flags, reserved, low: build.vxlan(vni, flags=flags, reserved=reserved, reserved_byte=low),
        VNI,
        st.sampled_from([0x08, 0x00, 0x88]) | st.integers(0, 255),
        st.just(b"\0\0\0") | st.binary(min_size=3, max_size=3),
        st.just(0) | st.integers(0, 255),
    ),
    st.binary(max_size=64),
    st.booleans(),
)
def test_vxlan_equals_the_rfc(header: bytes, behind: bytes, strict: bool) -> None:
    datagram = header + behind
    fault = vxlan_oracle.fault(datagram, strict=strict)
    expected = vxlan_oracle.decode(datagram) if fault is None else DropReason[fault]
    assert vxlan.decode(datagram, strict=strict) == expected


@given(VNI)
def test_each_vni_survives(vni: int) -> None:
    for codec in (geneve, vxlan):
        assert codec.decode(codec.encode(vni)) == (vni, 8)
