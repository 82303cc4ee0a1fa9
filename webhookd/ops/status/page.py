"""The page. Its policy: load nothing else, contact no other host, run no other script, stand in no frame."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from klein import Response


def load_page() -> Response:
    """Return the answer with the page, and a policy that names its own script and style by their hashes."""
    body = files(__package__).joinpath("page.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hash_of(b'script', body)}",
        f"style-src {_hash_of(b'style', body)}",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers: dict[str | bytes, str | bytes] = {
        b"Content-Type": b"text/html; charset=utf-8",
        b"Content-Length": b"%d" % len(body),
        b"Content-Security-Policy": "; ".join(policy).encode(),
        b"X-Content-Type-Options": b"nosniff",
        b"X-Frame-Options": b"DENY",
        b"Referrer-Policy": b"no-referrer",
        b"Cache-Control": b"no-cache",
    }
    return Response(200, headers, body)


def _hash_of(element: bytes, page: bytes) -> str:
    """Return the content of the one element of that name, as a source for a Content-Security-Policy."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), page, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content).digest()).decode()}'"
