"""The client's address, the proxies that are trusted to name it, and the networks of a source."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from webhookd.intake.auth import Authenticator, Credentials, client_address, sign
from webhookd.model import Unauthorized

ALLOWED = (ip_network("203.0.113.0/24"), ip_network("2001:db8::/32"))
TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
PROXY = "10.0.0.1"
CLIENT = "203.0.113.7"

IPS = st.ip_addresses().map(str)
#: X-Forwarded-For as a stranger can send it, before a proxy appends to it.
FORGED = st.one_of(st.binary(max_size=60), st.lists(IPS, max_size=4).map(lambda ips: ", ".join(ips).encode()))


def shown(peer: str | None, forwarded_for: str | None = None, real_ip: str | None = None) -> Credentials:
    return Credentials(
        peer=peer,
        forwarded_for=None if forwarded_for is None else forwarded_for.encode("latin-1"),
        real_ip=None if real_ip is None else real_ip.encode("latin-1"),
    )


class ClientAddressTests(SynchronousTestCase):
    def assert_from(self, expected: str | None, credentials: Credentials) -> None:
        address = client_address(credentials, TRUSTED)
        self.assertEqual(address, None if expected is None else ip_address(expected))

    def test_without_a_proxy_it_is_the_peer(self) -> None:
        self.assert_from(CLIENT, shown(CLIENT))
        self.assert_from("2001:db8::7", shown("2001:db8::7"))

    def test_headers_of_an_untrusted_peer_are_ignored(self) -> None:
        self.assert_from("198.51.100.1", shown("198.51.100.1", CLIENT, CLIENT))

    def test_a_unix_socket_has_no_address(self) -> None:
        self.assert_from(None, shown(None, CLIENT, CLIENT))

    def test_a_proxy_that_says_nothing_is_itself_the_client(self) -> None:
        self.assert_from(PROXY, shown(PROXY))

    def test_the_last_address_that_no_proxy_has(self) -> None:
        self.assert_from(CLIENT, shown(PROXY, f" {CLIENT} "))
        self.assert_from("2001:db8::7", shown(PROXY, "192.0.2.1,2001:db8::7,fd00::1"))
        self.assert_from(CLIENT, shown(PROXY, f"192.0.2.1, {CLIENT}"))
        self.assert_from(CLIENT, shown(PROXY, f"192.0.2.1, {CLIENT}, 10.0.0.2 ,fd00::1"))

    def test_if_all_are_proxies_it_is_the_first(self) -> None:
        self.assert_from("10.0.0.3", shown(PROXY, "10.0.0.3, 10.0.0.2"))

    def test_what_is_no_address_ends_the_search(self) -> None:
        for hop in (
            "",
            "\xff",
            "unknown",
            "_hidden",
            f"{CLIENT}:80",
            f"[{CLIENT}]",
            "203.0.113.0/24",
            "1",
            "0313.0.0161.7",
        ):
            with self.subTest(hop):
                self.assert_from(None, shown(PROXY, f"{CLIENT}, {hop}"))
                self.assert_from(None, shown(PROXY, f"{CLIENT}, {hop}, 10.0.0.2"))

    def test_the_real_ip_counts_only_alone(self) -> None:
        self.assert_from(CLIENT, shown(PROXY, real_ip=CLIENT))
        self.assert_from("192.0.2.1", shown(PROXY, "192.0.2.1", real_ip=CLIENT))
        self.assert_from(None, shown(PROXY, "", real_ip=CLIENT))
        self.assert_from(None, shown(PROXY, real_ip=f"{CLIENT}, {CLIENT}"))
        self.assert_from(None, shown(PROXY, real_ip="\xb2"))

    def test_ipv4_within_ipv6_is_ipv4(self) -> None:
        self.assert_from(CLIENT, shown(f"::ffff:{CLIENT}"))
        self.assert_from(CLIENT, shown("::ffff:10.0.0.1", f"::ffff:{CLIENT}"))

    @given(FORGED, IPS)
    def test_nothing_that_a_client_writes_hides_the_address_that_the_proxy_saw(
        self, forged: bytes, client: str
    ) -> None:
        seen = client_address(Credentials(peer=client), ())
        if seen is None or any(seen in network for network in TRUSTED):
            return
        forwarded_for = forged + b", " + client.encode()

        address = client_address(
            Credentials(peer=PROXY, forwarded_for=forwarded_for, real_ip=forged), TRUSTED
        )

        self.assertEqual(address, seen)

    @given(st.one_of(st.none(), IPS, st.text(max_size=20)), st.none() | FORGED, st.none() | FORGED)
    def test_garbage_is_an_address_or_none(
        self, peer: str | None, forwarded_for: bytes | None, real_ip: bytes | None
    ) -> None:
        client_address(Credentials(peer=peer, forwarded_for=forwarded_for, real_ip=real_ip), TRUSTED)


class AllowListTests(SynchronousTestCase):
    rule = Authenticator((), ("token",), 300, ALLOWED, TRUSTED)
    token = Credentials(token=b"token")

    def assert_refused(self, code: str, credentials: Credentials) -> None:
        error = self.assertRaises(Unauthorized, self.rule.verify, credentials, b"", 0.0)
        self.assertEqual(error.code, code)

    def test_a_client_in_the_network_with_a_token(self) -> None:
        self.assertIsNone(self.rule.verify(replace(self.token, peer=CLIENT), b"", 0.0))
        self.assertIsNone(self.rule.verify(replace(self.token, peer="2001:db8::7"), b"", 0.0))

    def test_neither_alone_is_enough(self) -> None:
        self.assert_refused("wrong_network", replace(self.token, peer="198.51.100.1"))
        forged = replace(self.token, peer="198.51.100.1", forwarded_for=CLIENT.encode())
        self.assert_refused("wrong_network", forged)
        self.assert_refused("missing_signature", Credentials(peer=CLIENT))

    def test_a_client_in_a_wrong_network_does_not_learn_whether_its_token_is_right(self) -> None:
        for token in (b"token", b"wrong"):
            self.assert_refused("wrong_network", Credentials(peer="198.51.100.1", token=token))

    def test_an_unknown_address_is_in_no_network(self) -> None:
        self.assert_refused("wrong_network", replace(self.token, peer=None))
        self.assert_refused("wrong_network", replace(self.token, peer=PROXY, forwarded_for=b"unknown"))

    def test_networks_apply_to_a_signed_request(self) -> None:
        rule = Authenticator(("secret",), (), 300, ALLOWED, TRUSTED)
        signed = Credentials(sign(b"secret", b"0", b"{}"), b"0", peer=CLIENT)
        self.assertEqual(rule.verify(signed, b"{}", 0.0), 0)
        elsewhere = replace(signed, peer="198.51.100.1")
        self.assertRaises(Unauthorized, rule.verify, elsewhere, b"{}", 0.0)

    def test_networks_apply_to_an_open_source(self) -> None:
        rule = Authenticator((), (), 300, ALLOWED, TRUSTED)
        self.assertTrue(rule.is_open)
        self.assertIsNone(rule.verify(Credentials(peer=CLIENT), b"", 0.0))
        self.assertRaises(Unauthorized, rule.verify, Credentials(peer=PROXY), b"", 0.0)

    def test_without_networks_any_address_is_accepted(self) -> None:
        rule = Authenticator((), (), 300)
        self.assertIsNone(rule.verify(Credentials(peer=None), b"", 0.0))
