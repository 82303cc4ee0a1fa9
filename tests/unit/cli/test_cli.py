"""The subcommands that need no daemon: their output, their exit codes, and no secrets."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from attrs import frozen
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from twisted.trial.unittest import SynchronousTestCase

from webhookd.cli.daemon import daemon_url
from webhookd.cli.main import PARTS, main
from webhookd.cli.terminal import WrongUse, brief
from webhookd.cli.verify import originals, read_headers
from webhookd.config import OPTIONS, resolve
from webhookd.intake.auth import sign
from webhookd.samples import SAMPLES

SECRET = "hush-hush"
BODY = SAMPLES["message_created"].body
NOW_S = 1_788_264_005


class CommandCase(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def file(self, content: bytes, name: str = "body.json") -> str:
        path = self.directory / name
        path.write_bytes(content)
        return str(path)

    def run_part(self, *arguments: str, stdin: str = "", **environ: str) -> Result:
        result = CliRunner(env=environ).invoke(main, arguments, input=stdin)
        self.assertNotIn(SECRET, result.output)
        self.assertIn(type(result.exception), (SystemExit, type(None)), result.exception)
        return result

    def succeed(self, *arguments: str, stdin: str = "", **environ: str) -> str:
        result = self.run_part(*arguments, stdin=stdin, **environ)
        self.assertEqual(result.exit_code, 0, result.output)
        return result.stdout

    def fail_with(self, code: int, *arguments: str, stdin: str = "", **environ: str) -> str:
        """Return the only line on the standard error."""
        result = self.run_part(*arguments, stdin=stdin, **environ)
        self.assertEqual(result.exit_code, code, result.output)
        (line,) = result.stderr.splitlines()
        self.assertTrue(line.isprintable(), line)
        return line


class HelpTests(CommandCase):
    def test_each_part_explains_itself(self) -> None:
        overview = self.succeed("--help")
        for part in PARTS:
            with self.subTest(part):
                self.assertIn(f"\n  {part} ", overview)
                text = self.succeed(part, "--help")
                self.assertIn("-h, --help", text)
                self.assertLessEqual(max(map(len, text.splitlines())), 80)

    def test_the_default_of_health_is_no_path(self) -> None:
        self.assertNotIn("[default: /health", self.succeed("health", "--help"))

    def test_there_is_no_other_part(self) -> None:
        self.assertIn("No such command 'x'", self.run_part("x").stderr)

    def test_completion(self) -> None:
        for shell in ("bash", "zsh", "fish"):
            self.assertIn("_WEBHOOKD_COMPLETE", self.succeed("completion", shell))

    def test_the_samples_are_completed(self) -> None:
        found = ShellComplete(main, {}, "webhookd", "").get_completions(["send"], "contact_")

        self.assertEqual(
            [(item.value, item.type) for item in found],
            [("contact_created", "plain"), ("contact_updated", "plain"), ("contact_", "file")],
        )


class BriefTests(SynchronousTestCase):
    """Untrusted text on a terminal."""

    def test_is_always_bounded(self) -> None:
        """An escape is longer than its character."""
        for text in ("x" * 10_000, "\x1b" * 10_000, "\U000e0001" * 10_000):
            shown = brief(text)
            self.assertTrue(shown.isprintable())
            self.assertEqual(len(shown), 300)


class AddressTests(SynchronousTestCase):
    def test_where_the_daemon_answers(self) -> None:
        for options, url in (
            ({}, "http://127.0.0.1:3001"),
            ({"port": "80", "interface": "0.0.0.0"}, "http://127.0.0.1:80"),  # noqa: S104  # none is bound
            ({"interface": "192.0.2.1"}, "http://192.0.2.1:3001"),
            ({"interface": "::"}, "http://[::1]:3001"),
            ({"interface": "2001:db8::1"}, "http://[2001:db8::1]:3001"),
            ({"endpoint": "tcp:80"}, "http://127.0.0.1:80"),
            ({"endpoint": "tcp:port=80:interface=192.0.2.1:backlog=9"}, "http://192.0.2.1:80"),
        ):
            self.assertEqual(daemon_url(resolve(options, {})), url)

    def test_an_endpoint_that_does_not_tell(self) -> None:
        for endpoint in ("unix:/run/webhookd.sock", "systemd:domain=INET:index=0", "ssl:443:privateKey=k"):
            settings = resolve({"endpoint": endpoint}, {})
            self.assertIn("--url", str(self.assertRaises(WrongUse, daemon_url, settings)))


class ConfigTests(CommandCase):
    def test_each_value_with_its_origin(self) -> None:
        toml = self.file(b"queue = 'q'\nspool = 'off'\n[sources.other]\nevents = ['b', 'a']", "webhookd.toml")
        text = self.succeed("config", "--config", toml, "--port", "8080", WEBHOOK_WIRE="6", WEBHOOK_TOKEN="t")
        rows = [line.split() for line in text.splitlines()]

        for row in (
            ["port", "--port", "8080"],
            ["wire", "WEBHOOK_WIRE", "6"],
            ["spool", toml, "off"],
            ["lock_ttl", "default", "5000"],
            ["ack", "default", "redis"],
            ["events", "default", "*"],
            ["events", toml, "[sources.other]", '["a",', '"b"]'],
            ["SOURCE", "other", "FROM", "VALUE"],
        ):
            self.assertIn(row, rows)

    def test_as_json(self) -> None:
        found = json.loads(
            self.succeed("config", "--json", "--ack", "replicas:2", "--networks", "10.0.0.0/8")
        )

        common = {value["option"]: value for value in found["options"]}
        own = {value["option"]: value for value in found["sources"]["chatwoot"]}
        self.assertEqual({*common, *own}, {option.name for option in OPTIONS})
        self.assertEqual(common["ack"], {"option": "ack", "value": "replicas:2", "origin": "--ack"})
        self.assertEqual(own["networks"]["value"], ["10.0.0.0/8"])
        self.assertEqual(own["job_options"]["value"]["attempts"], 3)
        self.assertNotIn("jobId", own["job_options"]["value"])
        self.assertIn("neither a secret nor a token", found["warnings"][0])

    def test_secrets_are_masked(self) -> None:
        given = {
            "WEBHOOK_SECRET": f"{SECRET},{SECRET}2",
            "WEBHOOK_TOKEN_FILE": self.file(f"{SECRET}\n".encode(), "token"),
            "REDIS_URL": f"redis://u:{SECRET}@h:1/2",
        }
        for form in ([], ["--json"]):
            text = self.succeed("config", *form, **given)
            self.assertIn("10 characters", text)
            self.assertIn("redis://h:1/2 (with a password)", text)

    def test_warnings(self) -> None:
        result = self.run_part("config", WEBHOOK_NOPE="1")

        self.assertIn("warning: WEBHOOK_NOPE in the environment", result.stderr)
        self.assertEqual(result.exit_code, 0)

    def test_what_cannot_be_used(self) -> None:
        for arguments, environ, words in (
            (["--port", "x"], {}, "--port: must be a whole number"),
            (["--config", "/nowhere"], {}, "/nowhere: cannot read the file"),
            ([], {"WEBHOOK_SECRET_FILE": str(self.directory)}, "WEBHOOK_SECRET_FILE: cannot read the file"),
        ):
            self.assertIn(words, self.fail_with(2, "config", *arguments, **environ))


class SignTests(CommandCase):
    def test_the_headers_of_a_body(self) -> None:
        expected = sign(SECRET.encode(), b"5", BODY).decode()
        for arguments in (["-"], [], [self.file(BODY)]):
            text = self.succeed(
                "sign", "--timestamp", "5", *arguments, stdin=BODY.decode(), WEBHOOK_SECRET=f"{SECRET},x"
            )
            self.assertEqual(text, f"X-Chatwoot-Timestamp: 5\nX-Chatwoot-Signature: {expected}\n")

    def test_as_json(self) -> None:
        found = json.loads(self.succeed("sign", "--json", stdin=BODY.decode(), WEBHOOK_SECRET=SECRET))

        self.assertEqual(list(found), ["X-Chatwoot-Timestamp", "X-Chatwoot-Signature"])

    def test_for_curl(self) -> None:
        path = self.file(BODY, "a body.json")
        text = self.succeed("sign", "--curl", path, "--url", "http://h:1/", WEBHOOK_SECRET=SECRET)

        self.assertTrue(text.startswith("curl -i http://h:1/webhook/chatwoot -H "), text)
        self.assertTrue(text.endswith(f" --data-binary '@{path}'\n"), text)

    def test_what_cannot_be_signed(self) -> None:
        self.assertIn("no secret", self.fail_with(2, "sign", stdin=BODY.decode()))
        self.assertIn("'y'", self.fail_with(2, "sign", "--source", "y", WEBHOOK_SECRET=SECRET))
        for path in (str(self.directory), "/nowhere"):
            self.assertIn("cannot read", self.fail_with(3, "sign", path, WEBHOOK_SECRET=SECRET))


@frozen
class Alteration:
    """A body before and after it was altered, and what ``verify`` says about it."""

    sent: bytes
    arrived: bytes
    finding: str


RAILS = rb'{"event":"x","content":"\u003cb\u003e \u0026 /","name":"' + "é".encode() + rb'","n":[1,2.5,null]}'
VALUE = json.loads(RAILS)
ALTERATIONS = (
    Alteration(RAILS, RAILS + b"\n", "without blanks and line ends around it"),
    Alteration(RAILS, b"\xef\xbb\xbf" + RAILS, "without the byte order mark"),
    Alteration(RAILS + b"\n", RAILS, "with a line end added"),
    Alteration(b'{\n"a":1}', b'{\r\n"a":1}', "with LF instead of CR LF"),
    Alteration(b'{\r\n"a":1}', b'{\n"a":1}', "with CR LF instead of LF"),
    Alteration(RAILS, json.dumps(VALUE).encode(), "JSON as Chatwoot itself writes it"),
    Alteration(RAILS, json.dumps(VALUE, indent=2).encode() + b"\n", "JSON as Chatwoot itself writes it"),
    Alteration('{"a":"é","b":"<"}'.encode(), b'{"a": "\\u00e9", "b": "<"}', "JSON as JavaScript writes it"),
    Alteration(b'{"a": 1}', b'{"a":1}', "JSON as Python writes it"),
    Alteration(b'{"a":"\\/\\u00e9"}', '{"a": "/é"}'.encode(), "JSON as PHP writes it"),
)


class VerifyTests(CommandCase):
    def signed(self, body: bytes, secret: str = SECRET, timestamp_s: int = NOW_S) -> list[str]:
        timestamp = str(timestamp_s)
        signature = sign(secret.encode(), timestamp.encode(), body).decode()
        return ["--signature", signature, "--timestamp", timestamp]

    def verify(
        self, body: bytes, shown: list[str], *arguments: str, at_s: int = NOW_S, **environ: str
    ) -> tuple[int, str]:
        environ = {"WEBHOOK_SECRET": f"{SECRET},other", **environ}
        options = [*shown, "--at", str(at_s), *arguments]
        result = self.run_part("verify", self.file(body), *options, **environ)
        return result.exit_code, result.output

    def test_what_is_accepted(self) -> None:
        for secret, which in ((SECRET, "secret 1 of 2"), ("other", "secret 2 of 2")):
            code, text = self.verify(BODY, self.signed(BODY, secret))
            self.assertEqual(code, 0, text)
            self.assertIn(which, text)

    def test_as_json(self) -> None:
        for body, accepted, reason in ((BODY, True, None), (b"{}", False, "wrong_signature")):
            shown = [*self.signed(BODY), "--at", str(NOW_S), "--json"]
            found = json.loads(self.run_part("verify", self.file(body), *shown, WEBHOOK_SECRET=SECRET).stdout)
            self.assertEqual((found["accepted"], found["code"]), (accepted, reason))

    def test_a_body_that_was_altered(self) -> None:
        for case in ALTERATIONS:
            with self.subTest(case.finding):
                code, text = self.verify(case.arrived, self.signed(case.sent))
                self.assertEqual(code, 1)
                self.assertIn("The secret is correct", text)
                self.assertIn(case.finding, text)

    def test_a_body_that_is_another(self) -> None:
        for body in (b"{}", b"", b"\xff", b"[" * 100_000):
            code, text = self.verify(body, self.signed(BODY))
            self.assertEqual(code, 1)
            self.assertIn("No secret of chatwoot (2 configured)", text)

    def test_a_secret_of_another_source(self) -> None:
        toml = self.file(
            b"[sources.second]\nsecret = 'its own'\n[sources.open]\nsecret = []", "webhookd.toml"
        )
        code, text = self.verify(BODY, self.signed(BODY, "its own"), "--config", toml)

        self.assertEqual(code, 1)
        self.assertIn("A secret of the source second signed it", text)

    def test_stale_and_by_how_much(self) -> None:
        for at_s, words in (
            (NOW_S + 301, "5 min old; the tolerance is 300 s"),
            (NOW_S + 7200, "2 h old"),
            (NOW_S + 8 * 86400, "8 d old"),
            (NOW_S - 3600, "60 min ahead"),
        ):
            code, text = self.verify(BODY, self.signed(BODY), at_s=at_s)
            self.assertEqual(code, 1)
            self.assertIn("The secret and the body are correct", text)
            self.assertIn(words, text)
        self.assertEqual(self.verify(BODY, self.signed(BODY), "--tolerance", "400", at_s=NOW_S + 301)[0], 0)

    def test_a_time_of_arrival_that_cannot_be(self) -> None:
        for at in ("inf", "1e400", "-1"):
            result = self.run_part(
                "verify", self.file(BODY), *self.signed(BODY), "--at", at, WEBHOOK_SECRET=SECRET
            )
            self.assertEqual(result.exit_code, 2)

    def test_a_timestamp_that_is_none(self) -> None:
        for timestamp, words in (("1788264005000", "milliseconds"), ("now", "not a decimal number")):
            shown = [*self.signed(BODY)[:2], "--timestamp", timestamp]
            code, text = self.verify(BODY, shown)
            self.assertEqual(code, 1)
            self.assertIn(words, text)

    def test_a_signature_that_is_none(self) -> None:
        for signature in ("", "x", "sha256=", self.signed(BODY)[1].upper(), self.signed(BODY)[1][7:]):
            code, text = self.verify(BODY, ["--signature", signature, *self.signed(BODY)[2:]])
            self.assertEqual(code, 1)
            self.assertIn("not of the form sha256=", text)

    def test_headers_as_they_are_shown_in_many_places(self) -> None:
        signature, timestamp = self.signed(BODY)[1::2]
        for text in (
            f"POST / HTTP/1.1\r\nX-Chatwoot-Timestamp: {timestamp}\r\nX-Chatwoot-Signature: {signature}\r\n",
            f"> x-chatwoot-timestamp: {timestamp}\n> x-chatwoot-signature: {signature}\n",
            json.dumps({"x-chatwoot-signature": signature, "X-Chatwoot-Timestamp": timestamp}),
            f'ts="x" x-chatwoot-timestamp="{timestamp}" x-chatwoot-signature="{signature}"',
        ):
            with self.subTest(text):
                code, output = self.verify(BODY, ["--headers", self.file(text.encode(), "headers")])
                self.assertEqual(code, 0, output)

    def test_what_cannot_be_judged(self) -> None:
        body = self.file(BODY)
        self.assertIn("no secret", self.fail_with(2, "verify", body))
        self.assertIn(
            "give --signature and --timestamp", self.fail_with(2, "verify", body, WEBHOOK_SECRET=SECRET)
        )
        for arguments in (["/nowhere", *self.signed(BODY)], [body, "--headers", "/nowhere"]):
            self.assertIn("cannot read", self.fail_with(3, "verify", *arguments, WEBHOOK_SECRET=SECRET))

    def test_no_header_is_found_where_there_is_none(self) -> None:
        self.assertEqual(read_headers(b"x-chatwoot-signatures: 1\nx-chatwoot-delivery: 2\n"), {})

    def test_what_a_sample_may_have_been_includes_the_sample(self) -> None:
        for sample in SAMPLES.values():
            loaded: Any = json.loads(sample.body)
            with self.subTest(sample.name):
                written = json.dumps(loaded, indent=4).encode()
                self.assertIn(sample.body, [original for _change, original in originals(written)])
