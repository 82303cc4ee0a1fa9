"""``webhookd verify``: whether a delivery's signature is accepted, and if not, why."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import click
from attrs import frozen

from webhookd.cli.settings import configured, find_source, secrets_of, source_option
from webhookd.cli.terminal import Negative, WrongUse, duration, json_option, print_json, read_file
from webhookd.config import Config, Source
from webhookd.intake.auth import REASONS, Authenticator, Credentials
from webhookd.model import Unauthorized

_ANY_AGE_S = 10**13  # more than a timestamp can say
_HEADER = re.compile(rb"""(?i)\bx-chatwoot-(signature|timestamp)["']?\s*[:=]\s*["']?([^\s"',]+)""")
_SIGNATURE = re.compile(rb"sha256=[0-9a-f]{64}")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@frozen
class Verdict:
    """The daemon's judgement: None, or one of the codes in `auth.REASONS`; and what was found about it."""

    code: str | None
    findings: Sequence[str]


@click.command()
@click.argument("body", metavar="BODY")
@click.option("--signature", metavar="VALUE", help="What stands in X-Chatwoot-Signature.")
@click.option("--timestamp", metavar="VALUE", help="What stands in X-Chatwoot-Timestamp.")
@click.option(
    "--headers", metavar="FILE", help="A file with both in it: headers as curl or a log shows them."
)
@click.option(
    "--at", type=float, metavar="SECONDS", show_default="now", help="When it arrived, in seconds since 1970."
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
    """Say why a signed delivery is not accepted.

    BODY is a file with the request's body, byte for byte, or "-" for the standard input. No secret is shown.

    Exit codes: 0 it would be accepted; 1 it would not.
    """
    secrets_of(find_source(settings, source))
    shown = read_headers(b"" if headers is None else read_file(headers))
    credentials = Credentials(
        signature=shown.get("signature") if signature is None else signature.encode(),
        timestamp=shown.get("timestamp") if timestamp is None else timestamp.encode(),
    )
    if credentials.signature is None or credentials.timestamp is None:
        raise WrongUse("a signature and a timestamp are needed: --signature and --timestamp, or --headers")
    verdict = examine(settings, source, credentials, read_file(body), time.time() if at is None else at)
    if as_json:
        print_json({"accepted": verdict.code is None, "code": verdict.code, "findings": verdict.findings})
    else:
        for finding in verdict.findings:
            click.echo(finding)
    if verdict.code is not None:
        raise Negative(f"it is refused: {REASONS[verdict.code]}")


def read_headers(text: bytes) -> Mapping[str, bytes]:
    """The ``signature`` and the ``timestamp``, wherever they stand in a text."""
    return {name.decode().lower(): value for name, value in _HEADER.findall(text)}


def examine(settings: Config, source: str, credentials: Credentials, body: bytes, now_s: float) -> Verdict:
    """The daemon's own judgement, and where it is no, what would make it a yes."""
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
        return Verdict(error.code, list(findings))
    which = f"secret {position + 1} of {len(own.secrets)} of the source {own.name}"
    return Verdict(None, [f"It is accepted, signed with {which}."])


def _verify(source: Source, credentials: Credentials, body: bytes, now_s: float, tolerance_s: int) -> int:
    """The position of the secret that matches; raises `Unauthorized`."""
    position = Authenticator(source.secrets, (), tolerance_s).verify(credentials, body, now_s)
    assert position is not None  # noqa: S101  # there are secrets, and no tokens
    return position


def _signed(source: Source, credentials: Credentials, body: bytes) -> bool:
    """Whether a secret of the source signed the body, whenever that was."""
    try:
        return bool(source.secrets) and _verify(source, credentials, body, 0, _ANY_AGE_S) >= 0
    except Unauthorized:
        return False


# -- why ----------------------------------------------------------------------------------------------------


def _malformed(credentials: Credentials) -> Iterator[str]:
    timestamp = credentials.timestamp or b""
    if timestamp.isdigit():
        yield f"The timestamp has {len(timestamp)} digits: Chatwoot's has seconds, and not milliseconds."
    else:
        yield "The timestamp is not a decimal number of seconds since 1970."


def _stale(settings: Config, credentials: Credentials, now_s: float) -> Iterator[str]:
    age_s = round(now_s - int(credentials.timestamp or b"0"))
    yield "The secret and the body are right."
    yield (
        f"The timestamp is {duration(abs(age_s))} {'old' if age_s > 0 else 'ahead'}; "
        f"{settings.tolerance_s} s are tolerated, either way."
    )
    yield "If that is not when it arrived, say when, with --at."
    yield "If it is, compare the clocks of the two machines."


def _wrong(settings: Config, own: Source, credentials: Credentials, body: bytes) -> Iterator[str]:
    if not _SIGNATURE.fullmatch(credentials.signature or b""):
        yield "The signature is not of the form sha256= and 64 hexadecimal digits in lower case."
        return
    for change, original in originals(body):
        if _signed(own, credentials, original):
            yield "The secret is right, and the body was altered on its way."
            yield f"It matches {change}."
            return
    for source in settings.sources.values():
        if _signed(source, credentials, body):
            yield f"A secret of the source {source.name} signed it, and none of {own.name}."
            return
    yield f"No secret of {own.name}, of {len(own.secrets)} known, signed this body and this timestamp."
    yield "It was another secret: each webhook, API inbox and bot of Chatwoot has its own."
    yield "Or the body or the timestamp is not what was sent."


# -- what a body may have been ------------------------------------------------------------------------------


def originals(body: bytes) -> Iterator[tuple[str, bytes]]:
    """What a body may have been before it was altered in one of the usual ways, and how one gets there."""
    stripped = body.removeprefix(_BYTE_ORDER_MARK).strip()
    yield "without the byte order mark at its beginning", body.removeprefix(_BYTE_ORDER_MARK)
    yield "without the blanks and line ends around it", stripped
    yield "with a line end behind it", body + b"\n"
    yield "with LF where it has CR LF", body.replace(b"\r\n", b"\n")
    yield "with CR LF where it has LF", body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return
    for writer, write in _WRITERS.items():
        yield f"as JSON that {writer} writes", write(value).encode("utf-8", "surrogatepass")


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
    "a compact writer of ASCII": lambda value: _compact(value, ascii_only=True),
    "a writer with an indent of two": lambda value: json.dumps(value, ensure_ascii=False, indent=2),
}
