"""The reprs of objects, in a traceback or a log, contain no secrets and no message content."""

from __future__ import annotations

from typing import cast

from twisted.trial.unittest import SynchronousTestCase

from webhookd import intake
from webhookd.chatwoot import payload as chatwoot
from webhookd.config import resolve
from webhookd.intake.auth import Authenticator, Credentials
from webhookd.model import Delivery, Job
from webhookd.reactor import IReactor
from webhookd.redis.pool import RedisEndpoint
from webhookd.redis.url import RedisUrl

CANARY = "canary-5b1f90"
SECRETS = {"secret": CANARY, "token": CANARY, "redis": f"redis://user:{CANARY}@127.0.0.1/0"}


class ReprTests(SynchronousTestCase):
    def assert_silent(self, *things: object) -> None:
        for thing in things:
            with self.subTest(type(thing).__name__):
                self.assertNotIn(CANARY, f"{thing!r} {thing}")

    def test_the_configuration(self) -> None:
        config = resolve(SECRETS, {})
        self.assertEqual(config.sources["chatwoot"].secrets, (CANARY,))
        self.assert_silent(config, *config.sources.values(), config.redis, RedisUrl.parse(SECRETS["redis"]))
        self.assert_silent(RedisEndpoint(cast(IReactor, None), config.redis, print))

    def test_authentication(self) -> None:
        rule = Authenticator((CANARY,), (CANARY,), 300)
        options = resolve({}, {}).sources["chatwoot"].job_options
        source = intake.SourcePolicy(rule, None, "chatwoot", options)
        takes = intake.Intake({"chatwoot": source}, intake.payload, chatwoot.hash_of_body, lambda _job: None)  # type: ignore[arg-type, return-value]
        self.assert_silent(rule, source, takes)

    def test_credentials(self) -> None:
        canary = CANARY.encode()
        self.assert_silent(Credentials(signature=canary, authorization=canary, token=canary))

    def test_message_content(self) -> None:
        body = CANARY.encode()
        self.assert_silent(
            Delivery("chatwoot", body, None, 0), Job("chatwoot", "id", "event", body, b"{}", 0)
        )
