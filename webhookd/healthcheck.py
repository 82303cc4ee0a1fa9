"""``python -m webhookd.healthcheck``: whether a daemon on this machine is well, as an exit code.

For a container's health check: it needs nothing but Python, and reads the port from the environment that the
daemon reads it from. ``--ready`` (an event could be accepted now) or ``--live`` (the default: it answers).
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping, Sequence

_DEADLINE_S = 3.0


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0 where it is, 1 where it is not, 2 where the question is wrong."""
    match list(arguments):
        case [] | ["--live"]:
            path = "/health/live"
        case ["--ready"]:
            path = "/health/ready"
        case _:
            sys.stderr.write("usage: python -m webhookd.healthcheck [--live | --ready]\n")
            return 2
    port = environ.get("WEBHOOK_PORT") or environ.get("PORT") or "3001"
    host = environ.get("WEBHOOK_INTERFACE") or "127.0.0.1"
    return _ask(host, port, path)


def _ask(host: str, port: str, path: str) -> int:
    try:
        connection = http.client.HTTPConnection(host, int(port), timeout=_DEADLINE_S)
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.stderr.write(f"{path} on {host}:{port}: {error}\n")
        return 1
    sys.stdout.write(f"{path} on {host}:{port}: {status}\n")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
