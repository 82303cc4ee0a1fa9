"""Authentication, pure: Chatwoot's signature, or a token for senders that cannot sign; and the network.

Chatwoot signs account webhooks since 4.11.2, and API inboxes and agent bots since 4.13.0. Automation rules,
macros and older versions do not sign. The signature covers ``timestamp + "." + raw body``:

    X-Chatwoot-Signature: sha256=<hex HMAC-SHA256, key = the secret's own characters>
    X-Chatwoot-Timestamp: <decimal Unix seconds of this attempt>

The timestamp is signed, so it limits how long a captured request can be replayed. A source can have several
secrets: account webhook, API inbox and bot each have their own, and a rotation has an old and a new one.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from hmac import compare_digest
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from attrs import field, frozen
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from msgspec import Struct

from webhookd.model import Unauthorized

_SIGNATURE_PREFIX = b"sha256="
_MAX_TIMESTAMP_DIGITS = 12

#: The reasons for a refusal: code -> message for the sender.
REASONS = {
    "missing_signature": "the request has no signature and no token",
    "bad_token": "the token is wrong",
    "malformed_signature": "the signature's timestamp is not a number of seconds",
    "wrong_signature": "the signature does not match",
    "stale_signature": "the signature's timestamp is too far from now",
    "wrong_network": "requests from this address are not accepted",
}

IPAddress = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Credentials(Struct, frozen=True):
    """The raw header and query values that authenticate a request; None if absent.

    ``peer`` is the address at the other end of the connection, None for a UNIX socket.
    """

    signature: bytes | None = None
    timestamp: bytes | None = None
    authorization: bytes | None = None
    token: bytes | None = None
    peer: str | None = None
    forwarded_for: bytes | None = None
    real_ip: bytes | None = None

    def __repr__(self) -> str:
        return f"<Credentials of {self.peer}>"  # the rest must not appear in a log


def _utf8(values: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(value.encode() for value in values)


@frozen
class Authenticator:
    """The rule of one source: a valid signature or a valid token, depending on which are configured.

    A source with neither secrets nor tokens is open: ``is_open``. ``tolerance_s`` applies to past and future
    timestamps. If there are ``networks``, the client must also be in one of them.
    """

    secrets: tuple[bytes, ...] = field(converter=_utf8, repr=False)
    tokens: tuple[bytes, ...] = field(converter=_utf8, repr=False)
    tolerance_s: int
    networks: tuple[Network, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    is_open: bool = field(init=False, eq=False)
    _keyed: tuple[HMAC, ...] = field(init=False, repr=False, eq=False)

    @is_open.default
    def _has_no_credentials(self) -> bool:
        return not self.secrets and not self.tokens

    @_keyed.default
    def _key_secrets(self) -> tuple[HMAC, ...]:
        return tuple(_key(secret) for secret in self.secrets)

    def verify(self, credentials: Credentials, body: bytes, now_s: float) -> int | None:
        """Return the position of the secret that matched, or None for a token or an open source.

        Raises `Unauthorized` with one of the codes in `REASONS`.
        """
        if self.networks:
            client = client_address(credentials, self.trusted_proxies)
            if client is None or not _is_in(client, self.networks):
                raise _unauthorized("wrong_network")
        if self.is_open or (self.tokens and self._token_matches(credentials)):
            return None
        if credentials.signature is None:
            shows_token = credentials.token is not None or credentials.authorization is not None
            raise _unauthorized("bad_token" if shows_token and self.tokens else "missing_signature")
        return self._verify_signature(credentials, body, now_s)

    def _verify_signature(self, credentials: Credentials, body: bytes, now_s: float) -> int:
        timestamp = credentials.timestamp or b""
        if not timestamp.isdigit() or len(timestamp) > _MAX_TIMESTAMP_DIGITS:
            raise _unauthorized("malformed_signature")
        for position, keyed in enumerate(self._keyed):
            if compare_digest(_signature(keyed, timestamp, body), credentials.signature or b""):
                if abs(now_s - int(timestamp)) > self.tolerance_s:
                    raise _unauthorized("stale_signature")
                return position
        raise _unauthorized("wrong_signature")

    def _token_matches(self, credentials: Credentials) -> bool:
        shown = [credentials.token, *_tokens_of(credentials.authorization)]
        return any(
            compare_digest(token, candidate)
            for candidate in shown
            if candidate is not None
            for token in self.tokens
        )


def sign(secret: bytes, timestamp: bytes, body: bytes) -> bytes:
    """Return the value of the signature header."""
    return _signature(_key(secret), timestamp, body)


def _key(secret: bytes) -> HMAC:
    return HMAC(secret, SHA256())


def _signature(keyed: HMAC, timestamp: bytes, body: bytes) -> bytes:
    """Return a signature from a copy of ``keyed``: keying an HMAC takes as long as hashing 1 kB of body.

    This uses cryptography, which takes three quarters of the time of Python's hmac.
    """
    mac = keyed.copy()
    mac.update(timestamp + b".")
    mac.update(body)
    return _SIGNATURE_PREFIX + mac.finalize().hex().encode()


def client_address(credentials: Credentials, trusted_proxies: Sequence[Network]) -> IPAddress | None:
    """Return the client's address, or None if it is unknown.

    Any sender can write ``X-Forwarded-For``, and each proxy appends the address of its client. So we read
    it from the end, as long as the writers are trusted proxies. ``X-Real-IP`` counts if it is absent.
    """
    client = _parse(credentials.peer)
    if client is None or not _is_in(client, trusted_proxies):
        return client
    if credentials.forwarded_for is None:
        return client if credentials.real_ip is None else _parse(credentials.real_ip.decode("latin-1"))
    for hop in reversed(credentials.forwarded_for.decode("latin-1").split(",")):
        client = _parse(hop)
        if client is None or not _is_in(client, trusted_proxies):
            break
    return client


def _parse(text: str | None) -> IPAddress | None:
    try:
        address = ip_address((text or "").strip())
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_in(address: IPAddress, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _unauthorized(code: str) -> Unauthorized:
    return Unauthorized(code, REASONS[code])


def _tokens_of(authorization: bytes | None) -> Sequence[bytes]:
    """Return the password of ``https://user:password@…``, which arrives as Basic, or a Bearer token."""
    if authorization is None:
        return ()
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return (value.strip(),)
    if scheme.lower() != b"basic":
        return ()
    try:
        _, _, password = b64decode(value.strip(), validate=True).partition(b":")
    except binascii.Error:
        return ()
    return (password,)
