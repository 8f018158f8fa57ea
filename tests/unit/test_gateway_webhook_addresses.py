"""Which addresses webhooks may go to, and which hosts are addresses in disguise."""

import ipaddress

import pytest

from services.gateway.background.webhooks.addresses import check_host, is_public
from shared.errors import InvalidRequest


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.0.1"),
        *("192.0.0.1", "192.0.0.8", "192.0.0.9", "192.0.0.170", "192.0.2.1", "192.88.99.1", "198.18.0.1"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:10.0.0.1", "::ffff:192.0.0.8", "::ffff:0:8.8.8.8"),
        *("64:ff9b::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "100:0:0:1::1"),
        *("2001::1", "2001:0:4136:e378::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:30::1", "2001:db8::1"),
        *("2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "4000::1", "fc00::1", "fd00::1"),
        *("fe80::1", "febf::1", "fec0::1", "feff::1", "ff02::1", "ff0e::1"),
    ],
)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "193.0.0.1", "223.255.255.255", "::ffff:8.8.8.8", "2606:4700::1111", "2a00:1450:4001::5e"],
)
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["8.8.8.010", "0x7f.1", "127.1", "2130706433", "0x7f000001", "017700000001", "1.2.3.4.", "example.08", "1."]
)
def test_addresses_in_another_spelling_are_refused(host: str) -> None:
    """The system's resolver takes most of them for addresses, and each library for another one."""
    with pytest.raises(InvalidRequest, match="four decimal numbers"):
        check_host(host, private=True)


@pytest.mark.parametrize(
    "host", ["example.org", "hooks.example.org.", "localhost", "1password.com", "xn--bcher-kva.de"]
)
def test_names_are_taken_without_being_looked_up(host: str) -> None:
    check_host(host, private=False)


@pytest.mark.parametrize(
    "host", ["a" * 64 + ".org", "..", ".example.org", "exa..mple.org", "a.b" * 90, "x_!.org", "bücher .de"]
)
def test_names_that_cannot_exist_are_refused(host: str) -> None:
    with pytest.raises(InvalidRequest, match="host"):
        check_host(host, private=False)


def test_a_private_address_is_refused_unless_those_are_allowed() -> None:
    with pytest.raises(InvalidRequest, match="private address"):
        check_host("10.0.0.1", private=False)
    check_host("10.0.0.1", private=True)
    check_host("8.8.8.8", private=False)
