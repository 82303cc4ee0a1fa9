"""Signatures of other implementations: Ruby's OpenSSL, which Chatwoot uses, and standardwebhooks."""

from __future__ import annotations

import json
import random
import subprocess
from base64 import b64decode, b64encode
from datetime import UTC, datetime

from standardwebhooks import Webhook

from tests.support.process import find_tool
from webhookd.intake.auth import Authenticator, Credentials, sign

from .target import Tally

_NOW_S = 1_788_264_005

#: Chatwoot's own expression, applied to each line of JSON: secret, timestamp, body in base64.
_RUBY = """
require 'json'
require 'base64'
require 'openssl'
STDIN.each_line do |line|
  secret, timestamp, body = JSON.parse(line)
  puts "sha256=#{OpenSSL::HMAC.hexdigest('SHA256', secret, "#{timestamp}.#{Base64.decode64(body)}")}"
end
"""


def attack_with_oracles(count: int) -> Tally:
    """Verify signatures of other implementations for random secrets and bodies."""
    tally = Tally("signatures by other implementations")
    cases = [_case(random.Random(number)) for number in range(count)]
    lines = [json.dumps([secret, timestamp, b64encode(body).decode()]) for secret, timestamp, body in cases]
    ruby = find_tool("ruby", "it is in Debian's package ruby")
    command = [ruby, "-e", _RUBY]
    by_ruby = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    for number, ((secret, timestamp, body), signature) in enumerate(zip(cases, by_ruby.split(), strict=True)):
        shown = Credentials(signature=signature.encode(), timestamp=timestamp.encode())
        position = Authenticator(("another", secret), (), 300).verify(shown, body, _NOW_S)
        tally.expect(f"Ruby {number}", "position of the secret", position, 1)
        tally.expect(
            f"standardwebhooks {number}", "digest", _by_standard_webhooks(secret, body), _ours(secret, body)
        )
    tally.tried = tally.accepted = 2 * count
    return tally


def _case(numbers: random.Random) -> tuple[str, str, bytes]:
    secret = "".join(numbers.choices("abcXYZ0189-_", k=numbers.randint(1, 100)))
    return secret, str(_NOW_S + numbers.randint(-300, 300)), numbers.randbytes(numbers.randint(0, 5000))


def _by_standard_webhooks(secret: str, body: bytes) -> str:
    """Return its digest: the message has an id before the timestamp; key and digest are in base64."""
    text = b64encode(body).decode()
    signer = Webhook(b64encode(secret.encode()).decode())
    signature = signer.sign("id", datetime.fromtimestamp(_NOW_S, tz=UTC), text)
    return b64decode(signature.removeprefix("v1,")).hex()


def _ours(secret: str, body: bytes) -> str:
    signature = sign(secret.encode(), b"id.%d" % _NOW_S, b64encode(body))
    return signature.decode().removeprefix("sha256=")
