"""``webhookd verify``: check a delivery's signature, and explain a rejection."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import click

from webhookd.cli.settings import configured, find_source, secrets_of, source_option
from webhookd.cli.terminal import Negative, WrongUse, duration, json_option, print_json, read_file
from webhookd.config import Config, Source
from webhookd.intake.auth import REASONS, Authenticator, Credentials
from webhookd.model import Unauthorized

_ANY_AGE_S = 10**13  # more than a timestamp can hold
_HEADER = re.compile(rb"""(?i)\bx-chatwoot-(signature|timestamp)["']?\s*[:=]\s*["']?([^\s"',]+)""")
_SIGNATURE = re.compile(rb"sha256=[0-9a-f]{64}")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@click.command()
@click.argument("body", metavar="BODY")
@click.option("--signature", metavar="VALUE", help="Value of X-Chatwoot-Signature.")
@click.option("--timestamp", metavar="VALUE", help="Value of X-Chatwoot-Timestamp.")
@click.option(
    "--headers", metavar="FILE", help="File that contains both headers, as curl or a log shows them."
)
@click.option(
    "--at",
    type=click.FloatRange(0, 10**12),
    metavar="SECONDS",
    show_default="now",
    help="Time of arrival, in seconds since 1970.",
)
@source_option
@configured("secret", "tolerance")
@json_option
def command(
    settings: Config,
    body: str,
    signature: str | None,
    timestamp: str | None,
    headers: str | None,
    at: float | None,
    source: str,
    *,
    as_json: bool,
) -> None:
    """Explain why a signature is rejected.

    BODY is a file with the request's body, byte for byte, or "-" for the standard input. No secret is shown.

    Exit codes: 0 accepted; 1 rejected.
    """
    secrets_of(find_source(settings, source))
    shown = read_headers(b"" if headers is None else read_file(headers))
    credentials = Credentials(
        signature=shown.get("signature") if signature is None else signature.encode(),
        timestamp=shown.get("timestamp") if timestamp is None else timestamp.encode(),
    )
    if credentials.signature is None or credentials.timestamp is None:
        raise WrongUse("no signature or no timestamp: give --signature and --timestamp, or --headers")
    now_s = time.time() if at is None else at
    code, findings = examine(settings, source, credentials, read_file(body), now_s)
    if as_json:
        print_json({"accepted": code is None, "code": code, "findings": findings})
    else:
        click.echo("\n".join(findings))
    if code is not None:
        raise Negative(f"rejected: {REASONS[code]}")


def read_headers(text: bytes) -> Mapping[str, bytes]:
    """Find the ``signature`` and the ``timestamp`` in a text of any form."""
    return {name.decode().lower(): value for name, value in _HEADER.findall(text)}


def examine(
    settings: Config, source: str, credentials: Credentials, body: bytes, now_s: float
) -> tuple[str | None, Sequence[str]]:
    """Return the daemon's own judgement, None or a code of `auth.REASONS`, and findings that explain it."""
    own = settings.sources[source]
    try:
        position = _verify(own, credentials, body, now_s, settings.tolerance_s)
    except Unauthorized as error:
        match error.code:
            case "malformed_signature":
                findings = _malformed(credentials)
            case "stale_signature":
                findings = _stale(settings, credentials, now_s)
            case _:
                findings = _wrong(settings, own, credentials, body)
        return error.code, list(findings)
    which = f"secret {position + 1} of {len(own.secrets)} of the source {own.name}"
    return None, [f"Accepted: signed with {which}."]


def _verify(source: Source, credentials: Credentials, body: bytes, now_s: float, tolerance_s: int) -> int:
    """Return the position of the secret that matches. Raises `Unauthorized`."""
    position = Authenticator(source.secrets, (), tolerance_s).verify(credentials, body, now_s)
    assert position is not None  # noqa: S101  # there are secrets, and no tokens
    return position


def _signed(source: Source, credentials: Credentials, body: bytes) -> bool:
    """Return whether a secret of the source signed the body, at any time."""
    try:
        return bool(source.secrets) and _verify(source, credentials, body, 0, _ANY_AGE_S) >= 0
    except Unauthorized:
        return False


# -- why ----------------------------------------------------------------------------------------------------


def _malformed(credentials: Credentials) -> Iterator[str]:
    timestamp = credentials.timestamp or b""
    if timestamp.isdigit():
        yield f"The timestamp has {len(timestamp)} digits: Chatwoot sends seconds, not milliseconds."
    else:
        yield "The timestamp is not a decimal number of seconds since 1970."


def _stale(settings: Config, credentials: Credentials, now_s: float) -> Iterator[str]:
    age_s = round(now_s - int(credentials.timestamp or b"0"))
    yield "The secret and the body are correct."
    yield (
        f"The timestamp is {duration(abs(age_s))} {'old' if age_s > 0 else 'ahead'}; "
        f"the tolerance is {settings.tolerance_s} s."
    )
    yield "If it arrived earlier, give the time of arrival with --at."
    yield "Otherwise, compare the clocks of the two machines."


def _wrong(settings: Config, own: Source, credentials: Credentials, body: bytes) -> Iterator[str]:
    if not _SIGNATURE.fullmatch(credentials.signature or b""):
        yield "The signature is not of the form sha256= and 64 lowercase hexadecimal digits."
        return
    for change, original in originals(body):
        if _signed(own, credentials, original):
            yield "The secret is correct, but the body was altered on its way."
            yield f"The original body is {change}."
            return
    for source in settings.sources.values():
        if _signed(source, credentials, body):
            yield f"A secret of the source {source.name} signed it, not one of {own.name}."
            return
    yield f"No secret of {own.name} ({len(own.secrets)} configured) signed this body and this timestamp."
    yield "Either the secret is another one: each webhook, API inbox and bot of Chatwoot has its own."
    yield "Or the body or the timestamp differs from what was sent."


# -- the original body -------------------------------------------------------------------------------------


def originals(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what a body may have been before one of the usual alterations, each with a description."""
    stripped = body.removeprefix(_BYTE_ORDER_MARK).strip()
    yield "the same without the byte order mark at the beginning", body.removeprefix(_BYTE_ORDER_MARK)
    yield "the same without blanks and line ends around it", stripped
    yield "the same with a line end added", body + b"\n"
    yield "the same with LF instead of CR LF", body.replace(b"\r\n", b"\n")
    yield "the same with CR LF instead of LF", body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return
    for writer, write in _WRITERS.items():
        yield f"the same JSON as {writer} writes it", write(value).encode("utf-8", "surrogatepass")


def _compact(value: object, *, ascii_only: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))


def _as_rails(value: object) -> str:
    text = _compact(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_WRITERS: Mapping[str, Callable[[object], str]] = {
    "Chatwoot itself": _as_rails,
    "JavaScript": _compact,
    "PHP": lambda value: _compact(value, ascii_only=True).replace("/", "\\/"),
    "Python": json.dumps,
    "a compact writer in ASCII": lambda value: _compact(value, ascii_only=True),
    "a writer with an indent of 2": lambda value: json.dumps(value, ensure_ascii=False, indent=2),
}
