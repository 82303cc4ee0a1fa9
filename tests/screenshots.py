"""The pictures of the status page in README.md: a replica after five minutes of load, and without Redis.

python -m tests.screenshots
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tests.support.browser import Browser
from tests.support.http import exchange, request_bytes
from tests.support.prometheus import ObservedDaemon
from tests.support.servers import RedisServer
from tests.support.webhooks import PATH, connected, post, webhook
from tests.support.workers import Worker

IMAGES = Path(__file__).parents[1] / "docs" / "images"
JSON = {"Content-Type": "application/json"}

_LOADED_S = 310
_DEGRADED_S = 40
_WAVE_S = 90
_PER_SECOND = 25
_REFUSED = (
    request_bytes("POST", PATH, JSON, b"[]"),
    request_bytes("POST", f"{PATH}/old", JSON, b"{}"),
    request_bytes("POST", PATH, {"Content-Type": "text/plain"}, b"{}"),
)


@contextmanager
def load(port: int) -> Iterator[None]:
    """Send events at a changing rate: most are new, some are repeated, and few are refused."""
    over = Event()

    def send() -> None:
        number = 0
        while not over.wait(random.expovariate(_PER_SECOND * (1.4 + math.sin(time.time() / _WAVE_S * 6.28)))):
            number += 1
            post(port, webhook(number if number % 12 else number - 3))
            if number % 1900 == 0:
                exchange(port, random.choice(_REFUSED))

    thread = Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Take both pictures."""
    IMAGES.mkdir(exist_ok=True)
    durable = ["appendonly yes", "appendfsync everysec"]
    with (
        RedisServer(config=durable) as redis,
        Worker("bullmq6", redis.port),
        ObservedDaemon("--redis", redis.url) as daemon,
        Browser() as browser,
        load(connected(daemon).port),
    ):

        def look(scheme: str, seconds: float) -> None:
            view = {"width": 1120, "height": 800}
            browser.open(f"http://{daemon.host}:{daemon.ops_port}/", viewport=view, colorScheme=scheme)
            time.sleep(seconds)

        look("light", _LOADED_S)
        browser.screenshot(IMAGES / "status-ok.png", fullPage=True)
        redis.kill()
        look("dark", _DEGRADED_S)
        browser.screenshot(IMAGES / "status-degraded.png", fullPage=True)


if __name__ == "__main__":
    main()
