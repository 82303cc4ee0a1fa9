"""Every option under all its names, and a one-line error for each mistake."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from attrs import frozen
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.options import JobOptions
from webhookd.bullmq.script import Wire
from webhookd.cli.main import main
from webhookd.config import (
    ALL_OPTIONS,
    DEFAULT,
    DEFAULT_JOB_OPTIONS,
    DEFAULT_SOURCE,
    OPTIONS,
    Config,
    Option,
    resolve,
)
from webhookd.model import ConfigError
from webhookd.redis.url import RedisUrl
from webhookd.service import Options

OPTION = {option.name: option for option in OPTIONS}
SECRET = "s3cret"


@frozen
class Value:
    """One value of an option: as a string, as TOML, and as parsed in the `Config`."""

    text: str
    toml: str
    parsed: object


def number(value: float) -> Value:
    return Value(str(value), str(value), value)


def text(value: str, parsed: object = None) -> Value:
    return Value(value, json.dumps(value), value if parsed is None else parsed)


def texts(*values: str, parsed: object = None) -> Value:
    return Value(",".join(values), json.dumps(values), values if parsed is None else parsed)


def off(value: str) -> Value:
    return Value(value, json.dumps(value), None)


VALUES: Mapping[str, tuple[Value, ...]] = {
    "port": (number(1), number(8080), number(65535), Value(" 3002 ", '"3002"', 3002)),
    "interface": (text("127.0.0.1"), text("::1")),
    "endpoint": (text("systemd:domain=INET:index=0"), text("unix:/run/webhookd.sock")),
    "ops_endpoint": (text("tcp:9000"), off("off")),
    "redis": tuple(text(url, RedisUrl.parse(url)) for url in ("redis://h:1/2", "embedded:", "unix:///run/r")),
    "queue": (text("events"), text("{q}")),
    "prefix": (text("{bull}"), text("a:b")),
    "wire": (text("5", Wire.V5), text("6", Wire.V6), Value("AUTO", "5", Wire.V5)),
    "job_options": tuple(
        Value(json.dumps(options), toml, JobOptions.from_mapping(options))
        for options, toml in (({"attempts": 5}, "{attempts = 5}"), ({"lifo": True}, '"{\\"lifo\\":true}"'))
    ),
    "job_data": (text("envelope"), text("payload")),
    "lock_ttl": (number(1), number(60_000)),
    "dedup_ttl": (number(0), number(86_400_000)),
    "events": (
        texts("message_created", "x", parsed=frozenset({"message_created", "x"})),
        Value("x, *", '"*"', None),
    ),
    "secret": (texts("a", "b"), texts(SECRET)),
    "token": (texts("c"), texts("d", "e")),
    "tolerance": (number(1), number(600)),
    "networks": tuple(
        texts(*names, parsed=tuple(map(ip_network, names)))
        for names in (["192.0.2.0/24"], ["10.0.0.0/8", "2001:db8::/32"], ["192.0.2.1"])
    ),
    "trusted_proxies": tuple(texts(name, parsed=(ip_network(name),)) for name in ("10.0.0.0/8", "::1")),
    "max_body": (number(1), number(1000)),
    "max_in_flight": (number(1), number(7)),
    "max_in_flight_bytes": (number(1), number(10**9)),
    "redis_deadline": (number(0.01), number(1.5), Value("1", "1", 1.0)),
    "id_fallback": (text("none"), text("hash")),
    "ack": (Value("redis", '"redis"', 0), Value("replicas:2", '"replicas:2"', 2)),
    "spool": (text("/var/spool/webhookd"), off("off")),
    "spool_max_bytes": (number(1), number(10**12)),
    "drain_timeout": (number(0), number(3600), number(2.5)),
    "log_format": (text("json"), text("text")),
    "log_level": (text("debug"), text("error"), text("WARN", "warn")),
    "access_log": (Value("on", "true", True), Value("off", "false", False), Value("ON", '"on"', True)),
    "tracing": (text("otlp"), text("off"), text("OTLP", "otlp")),
}

DEFAULTS: Mapping[str, object] = {
    "port": 3001,
    "interface": "",
    "endpoint": "tcp:3001:backlog=1024",
    "ops_endpoint": "tcp:9101:interface=127.0.0.1",
    "redis": RedisUrl(hosts=(("127.0.0.1", 6379),)),
    "queue": "chatwoot",
    "prefix": "bull",
    "wire": Wire.AUTO,
    "job_options": JobOptions.from_mapping(DEFAULT_JOB_OPTIONS),
    "job_data": "payload",
    "lock_ttl": 5000,
    "dedup_ttl": 3_600_000,
    "events": None,
    "secret": (),
    "token": (),
    "tolerance": 300,
    "networks": (),
    "trusted_proxies": (),
    "max_body": 16 * 1024**2,
    "max_in_flight": 10_000,
    "max_in_flight_bytes": 256 * 1024**2,
    "redis_deadline": 0.5,
    "id_fallback": "hash",
    "ack": 0,
    "spool": "var/spool",
    "spool_max_bytes": 1024**3,
    "drain_timeout": 10.0,
    "log_format": "text",
    "log_level": "info",
    "access_log": False,
    "tracing": "off",
}

BAD_NUMBERS = ("", " ", "x", "-1", "1.5", "1e3", "0x1", "1_0", "٣", 17 * "9", 5000 * "9", "NaN")

BAD_TEXTS: Mapping[str, tuple[str, ...]] = {
    "port": (*BAD_NUMBERS, "0", "65536", "tcp://10.0.0.1:3001"),
    "interface": ("", " "),
    "endpoint": ("",),
    "ops_endpoint": ("",),
    "redis": ("", "h:6379", "http://h", f"redis://:{SECRET}@h/x", "tcp://10.0.0.1:6379"),
    "queue": ("", "a:b"),
    "prefix": ("", " "),
    "wire": ("", "4", "7", "auto5"),
    "job_options": (
        "",
        "{",
        "[]",
        "null",
        "5",
        '{"attempts":"3"}',
        '{"attempts":-1}',
        '{"jobId":"x"}',
        '{"no such\\noption":1}',
        '{"backoff":{"type":"\\ud800"}}',
        '{"attempts":%s}' % (5000 * "1"),
        100_000 * "[",
    ),
    "job_data": ("", "body"),
    "lock_ttl": (*BAD_NUMBERS, "0"),
    "dedup_ttl": BAD_NUMBERS,
    "events": ("", "a,,b", ","),
    "secret": ("", f"{SECRET},", ","),
    "token": ("", f"{SECRET},,x"),
    "tolerance": (*BAD_NUMBERS, "0"),
    "networks": ("", "x", "192.0.2.1/24", "192.0.2.0/33", "a\nb"),
    "trusted_proxies": ("", "10.0.0.0/8,", "all"),
    "max_body": (*BAD_NUMBERS, "0"),
    "max_in_flight": (*BAD_NUMBERS, "0"),
    "max_in_flight_bytes": (*BAD_NUMBERS, "0"),
    "redis_deadline": ("", "x", "0", "0.001", "1.51", "-0.5", "nan", "inf", "-inf", "1e99", 5000 * "9"),
    "id_fallback": ("", "random"),
    "ack": ("", "2", "replicas", "replicas:0", "replicas:100", "replicas:x", "redis:1"),
    "spool": ("", " "),
    "spool_max_bytes": (*BAD_NUMBERS, "0"),
    "drain_timeout": ("", "x", "-1", "3601", "nan", "inf"),
    "log_format": ("", "xml"),
    "log_level": ("", "critical", "info,debug"),
    "access_log": ("", "yes", "1", "true"),
    "tracing": ("", "on", "grpc"),
}

BAD_TOML: Mapping[str, tuple[str, ...]] = {
    "port": ('""', "0", "1.0", "true", "[3001]", "{}", "1979-05-27", "9" * 400),
    "interface": ("5", "true", "[]"),
    "redis": ("5", '["redis://h"]'),
    "queue": ("5", '["a"]'),
    "wire": ("5.0", "true", "[5]"),
    "job_options": ("5", "[]", '{attempts = "3"}', "{nope = 1}", "1979-05-27", "{backoff = 1979-05-27}"),
    "events": ("5", "[5]", "{}", '["x", ""]', "true"),
    "secret": ("5", "[5]", f'["{SECRET}", 5]', f'{{a = "{SECRET}"}}'),
    "networks": ("5", "[5]", "true"),
    "redis_deadline": ("true", "false", '""', "nan", "inf", "[]", "1979-05-27", "9" * 400),
    "spool": ("5", "true", "false"),
    "ack": ("2", "true"),
    "access_log": ("1", '"yes"', "[]"),
}


def environment_name(option: Option) -> str:
    return option.environment[0]


def on_command_line(option: Option, value: str) -> Mapping[str, object]:
    return {option.name: value.split(",") if option.repeatable else value}


def value_of(config: Config, option: Option) -> object:
    holder = config.sources[DEFAULT_SOURCE] if option.per_source else config
    return getattr(holder, option.field)


class ConfigCase(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def file(self, content: str | bytes, name: str = "webhookd.toml") -> str:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def from_toml(self, content: str | bytes) -> Config:
        return resolve({"config": self.file(content)}, {})

    def assert_refused(
        self,
        culprit: str,
        command_line: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Assert that the error is one line that begins with the culprit and shows no secret."""
        error = self.assertRaises(ConfigError, resolve, command_line or {}, environment or {})
        message = str(error)
        self.assertTrue(message.startswith(culprit), message)
        self.assertTrue(message.isprintable(), repr(message))
        self.assertLess(len(message), 400)
        self.assertNotIn(SECRET, message)
        return message

    def assert_toml_refused(self, culprit: str, content: str | bytes) -> str:
        return self.assert_refused(culprit, {"config": self.file(content)})


class TableTests(SynchronousTestCase):
    def test_these_tests_know_every_option(self) -> None:
        names = {option.name for option in OPTIONS}
        for table in (VALUES, DEFAULTS, BAD_TEXTS):
            self.assertEqual(set(table), names)
        self.assertLessEqual(set(BAD_TOML), names)

    def test_no_two_options_share_a_name(self) -> None:
        for names in (
            [option.flag for option in ALL_OPTIONS],
            [option.field for option in ALL_OPTIONS],
            [name for option in ALL_OPTIONS for name in option.environment],
        ):
            self.assertEqual(len(set(names)), len(names))

    def test_the_names_that_others_rely_on(self) -> None:
        for name, environment in (
            ("port", ("WEBHOOK_PORT", "PORT")),
            ("lock_ttl", ("WEBHOOK_JOB_CREATE_LOCK_TTL",)),
            ("redis", ("REDIS_URL",)),
        ):
            self.assertEqual(OPTION[name].environment, environment)

    def test_every_other_environment_name_says_whose_it_is(self) -> None:
        for option in ALL_OPTIONS:
            self.assertTrue(option.environment[0].startswith("WEBHOOK_") or option.name == "redis")


class HelpTests(SynchronousTestCase):
    def test_the_help_names_the_default_and_the_variables(self) -> None:
        for name, words in (
            ("port", "[env var: WEBHOOK_PORT, PORT; default: 3001]"),
            ("interface", "[env var: WEBHOOK_INTERFACE; default: (all)]"),
            ("redis", "[env var: REDIS_URL, REDIS_URL_FILE; default: redis://127.0.0.1:6379/0]"),
            ("token", "[env var: WEBHOOK_TOKEN, WEBHOOK_TOKEN_FILE; default: (none)]"),
        ):
            self.assertTrue(OPTION[name].full_help.endswith(words), OPTION[name].full_help)

    def test_both_commands_show_it(self) -> None:
        for usage in (Options().getUsage(), CliRunner().invoke(main, ["config", "--help"]).stdout):
            shown = " ".join(usage.split())
            for option in ALL_OPTIONS:
                for words in (*option.variables, f"default: {option.shown_default}", option.full_help):
                    self.assertIn(" ".join(words.split()), shown)


class PrecedenceTests(ConfigCase):
    def test_the_defaults(self) -> None:
        config = resolve({}, {})
        for option in OPTIONS:
            with self.subTest(option.name):
                self.assertEqual(value_of(config, option), DEFAULTS[option.name])

    def test_every_value_in_every_place(self) -> None:
        for option in OPTIONS:
            for value in VALUES[option.name]:
                for place, config in (
                    ("command line", resolve(on_command_line(option, value.text), {})),
                    *((name, resolve({}, {name: value.text})) for name in option.environment),
                    ("file", self.from_toml(f"{option.name} = {value.toml}")),
                ):
                    if place == "file" and option.name == "wire" and value.text == "AUTO":
                        continue  # its TOML value is another one
                    with self.subTest(f"{option.name} {value.text} {place}"):
                        parsed = Wire.AUTO if value.text == "AUTO" else value.parsed
                        self.assertEqual(value_of(config, option), parsed)

    def test_a_number_is_as_good_as_a_text_in_toml(self) -> None:
        self.assertEqual(self.from_toml("wire = 5").wire, Wire.V5)

    @given(st.sampled_from(OPTIONS), st.data())
    def test_command_line_before_environment_before_file_before_default(
        self, option: Option, data: st.DataObject
    ) -> None:
        maybe = st.one_of(st.none(), st.sampled_from(VALUES[option.name][:2]))
        given_, environment, file = (
            data.draw(maybe, label=place) for place in ("line", "environment", "file")
        )
        command_line: dict[str, Any] = dict(on_command_line(option, given_.text)) if given_ else {}
        if file is not None:
            command_line["config"] = self.file(f"{option.name} = {file.toml}")
        variables = {environment_name(option): environment.text} if environment else {}

        config = resolve(command_line, variables)

        winner = given_ or environment or file
        self.assertEqual(value_of(config, option), winner.parsed if winner else DEFAULTS[option.name])

    def test_of_two_environment_names_the_first_wins(self) -> None:
        self.assertEqual(resolve({}, {"WEBHOOK_PORT": "1", "PORT": "2"}).port, 1)

    def test_an_empty_variable_is_none(self) -> None:
        empty = {name: "" for option in ALL_OPTIONS for name in (*option.environment, "WEBHOOK_SECRET_FILE")}

        self.assertEqual(resolve({}, empty), resolve({}, {}))
        self.assertEqual(resolve({}, {"WEBHOOK_PORT": "", "PORT": "2"}).port, 2)

    def test_a_bad_value_that_is_not_asked_for_does_no_harm(self) -> None:
        self.assertEqual(resolve({"port": "1"}, {"WEBHOOK_PORT": "x", "PORT": "tcp://h"}).port, 1)

    def test_the_file_itself_can_be_named_in_two_places(self) -> None:
        first, second = self.file("port = 1", "first.toml"), self.file("port = 2", "second.toml")

        self.assertEqual(resolve({}, {"WEBHOOK_CONFIG": first}).port, 1)
        self.assertEqual(resolve({"config": second}, {"WEBHOOK_CONFIG": first}).port, 2)


class EndpointTests(SynchronousTestCase):
    def test_the_endpoint_comes_from_port_and_interface(self) -> None:
        for interface, endpoint in (
            ("127.0.0.1", "tcp:80:backlog=1024:interface=127.0.0.1"),
            ("::1", r"tcp:80:backlog=1024:interface=\:\:1"),
        ):
            self.assertEqual(resolve({"port": "80", "interface": interface}, {}).endpoint, endpoint)

    def test_the_operators_port_keeps_its_distance(self) -> None:
        for port, ops_port in (("3001", 9101), ("59435", 65535), ("59436", 53336), ("65535", 59435)):
            config = resolve({"port": port}, {})
            self.assertEqual(config.ops_endpoint, f"tcp:{ops_port}:interface=127.0.0.1")


class BadValueTests(ConfigCase):
    def test_a_bad_value_is_named_where_it_stands(self) -> None:
        for name, bad in BAD_TEXTS.items():
            for value in bad:
                with self.subTest(f"{name} {value[:40]!r}"):
                    option = OPTION[name]
                    self.assert_refused(f"--{option.flag}: ", on_command_line(option, value))
                    for variable in option.environment:
                        if value:
                            self.assert_refused(f"{variable}: ", environment={variable: value})

    def test_a_bad_value_in_toml(self) -> None:
        for name, bad in BAD_TOML.items():
            for value in bad:
                with self.subTest(f"{name} {value[:40]}"):
                    self.assert_toml_refused(f"{name}: ", f"{name} = {value}")

    def test_what_kubernetes_sets_for_a_service_is_told_apart(self) -> None:
        message = self.assert_refused("WEBHOOK_PORT: ", environment={"WEBHOOK_PORT": "tcp://10.0.0.1:3001"})

        self.assertIn("enableServiceLinks", message)

    def test_a_variable_that_is_not_utf8(self) -> None:
        self.assert_refused("WEBHOOK_SECRET: ", environment={"WEBHOOK_SECRET": f"{SECRET}\udcff"})
        self.assert_refused("WEBHOOK_SPOOL: ", environment={"WEBHOOK_SPOOL": "\udcff"})


class FileTests(ConfigCase):
    def test_a_file_that_cannot_be_read(self) -> None:
        missing = str(self.directory / "missing.toml")

        for path in (missing, str(self.directory), f"{self.file('')}/x"):
            with self.subTest(path):
                self.assertIn("cannot read the file", self.assert_refused(path, {"config": path}))
        self.assert_refused(missing, environment={"WEBHOOK_CONFIG": missing})
        self.assert_refused("--config: ", {"config": ""})

    def test_a_file_that_is_not_utf8(self) -> None:
        self.assertIn("UTF-8", self.assert_toml_refused(str(self.directory), b"queue = '\xff'"))

    def test_a_file_that_is_not_toml(self) -> None:
        for content in (
            "port",
            "port: 1",
            "{",
            "port = 1\nport = 2",
            "[sources.a]\n[sources.a]",
            f'secret = "{SECRET}',
            f"secret = {SECRET}",
            f'secret = "{SECRET}\x01"',
            f'secret = "{SECRET}\\q"',
            f"port = {5000 * '1'}",
            f"port = {5000 * '['}",
        ):
            with self.subTest(content[:40]):
                self.assert_toml_refused(str(self.directory), content)

    def test_keys_that_are_no_option(self) -> None:
        for content, key in (
            ("ports = 1", "ports"),
            ("lock-ttl = 1", "lock-ttl"),
            ("lock_ttl_ms = 1", "lock_ttl_ms"),
            ("config = 'x'", "config"),
            (f"secret_file = '{SECRET}'", "secret_file"),
            ("[webhook]\nport = 1", "webhook"),
            ("[source.x]", "source"),
            (r'"a\nb" = 1', r"a\nb"),
            (r'"\u001b[31m" = 1', r"\x1b[31m"),
        ):
            with self.subTest(key):
                self.assert_toml_refused(f"{key}: there is no such option", content)

    def test_an_empty_file(self) -> None:
        self.assertEqual(self.from_toml(""), resolve({}, {}))


class SecretFileTests(ConfigCase):
    def test_secrets_from_files(self) -> None:
        for option in OPTIONS:
            if option.secret:
                value = VALUES[option.name][0]
                path = self.file(value.text.replace(",", "\n") + "\n")
                with self.subTest(option.name):
                    config = resolve({}, {f"{environment_name(option)}_FILE": path})
                    self.assertEqual(value_of(config, option), value.parsed)

    def test_the_variable_itself_wins_over_its_file(self) -> None:
        environment = {"WEBHOOK_SECRET": "a", "WEBHOOK_SECRET_FILE": self.file("b")}

        self.assertEqual(resolve({}, environment).sources[DEFAULT_SOURCE].secrets, ("a",))

    def test_a_file_wins_over_the_toml(self) -> None:
        toml, path = self.file('secret = "a"'), self.file("b", "secret")
        config = resolve({"config": toml}, {"WEBHOOK_SECRET_FILE": path})

        self.assertEqual(config.sources[DEFAULT_SOURCE].secrets, ("b",))

    def test_files_that_hold_no_secret(self) -> None:
        for path in (str(self.directory), "/nowhere", self.file(""), self.file("\n \n"), self.file(b"\xff")):
            with self.subTest(path):
                self.assert_refused("WEBHOOK_SECRET_FILE: ", environment={"WEBHOOK_SECRET_FILE": path})
        self.assert_refused("REDIS_URL_FILE: ", environment={"REDIS_URL_FILE": self.file(f"x://{SECRET}")})

    def test_only_secrets_are_read_from_files(self) -> None:
        config = resolve({}, {"WEBHOOK_QUEUE_FILE": self.file("q")})

        self.assertEqual(config.sources[DEFAULT_SOURCE].queue, "chatwoot")
        self.assertIn("WEBHOOK_QUEUE_FILE", config.warnings[0])


class SourceTests(ConfigCase):
    COMMON = 'secret = "a"\ntoken = "b"\nevents = ["x"]\nqueue = "q"\nnetworks = ["10.0.0.0/8"]\n'

    def test_a_source_inherits_what_it_does_not_say(self) -> None:
        config = self.from_toml(self.COMMON + '[sources.other]\nqueue = "r"\n')
        default, other = config.sources["chatwoot"], config.sources["other"]

        self.assertEqual((default.queue, other.queue), ("q", "r"))
        self.assertEqual(other.name, "other")
        for field in ("secrets", "tokens", "events", "networks", "job_options"):
            self.assertEqual(getattr(other, field), getattr(default, field))

    def test_a_source_can_say_everything_that_is_its_own(self) -> None:
        per_source = [option for option in OPTIONS if option.per_source]
        lines = [f"{option.name} = {VALUES[option.name][0].toml}" for option in per_source]
        config = self.from_toml(self.COMMON + "[sources.chatwoot]\n" + "\n".join(lines))

        self.assertEqual(list(config.sources), ["chatwoot"])
        for option in per_source:
            self.assertEqual(value_of(config, option), VALUES[option.name][0].parsed)

    def test_a_source_can_want_no_secret_although_there_is_a_common_one(self) -> None:
        config = self.from_toml(self.COMMON + "[sources.open]\nsecret = []\ntoken = []\n")

        self.assertEqual((config.sources["open"].secrets, config.sources["open"].tokens), ((), ()))
        self.assertIn("source open", config.warnings[0])

    def test_what_the_environment_says_is_common_to_all(self) -> None:
        config = resolve(
            {"config": self.file("[sources.a]\n[sources.b]\nqueue = 'own'\n")}, {"WEBHOOK_QUEUE": "common"}
        )

        queues = {name: source.queue for name, source in config.sources.items()}
        self.assertEqual(queues, {"a": "common", "b": "own", "chatwoot": "common"})

    def test_what_is_no_option_of_a_source(self) -> None:
        for option in OPTIONS:
            if not option.per_source:
                content = f"[sources.a]\n{option.name} = {VALUES[option.name][0].toml}"
                self.assert_toml_refused(f"[sources.a] {option.name}: there is no such option", content)
        self.assert_toml_refused("[sources.a] nope: there is no such option", "[sources.a]\nnope = 1")

    def test_a_bad_value_of_a_source(self) -> None:
        for name, bad in BAD_TOML.items():
            if OPTION[name].per_source:
                for value in bad:
                    with self.subTest(f"{name} {value}"):
                        self.assert_toml_refused(f"[sources.a] {name}: ", f"[sources.a]\n{name} = {value}")

    def test_names_that_cannot_be_in_a_path_or_a_job_id(self) -> None:
        for name in ("", "A", "1a", "a b", "a/b", "a.b", "é", "-a", "a:b", 33 * "a", "a\\nb", "a\\u001b"):
            with self.subTest(name):
                self.assert_toml_refused("[sources.", f'[sources."{name}"]')

    def test_the_longest_name(self) -> None:
        self.assertIn(32 * "a", self.from_toml(f"[sources.{32 * 'a'}]").sources)

    def test_sections_that_are_no_tables(self) -> None:
        for content in ("sources = 5", "sources = []", "[sources]\na = 5", "[[sources]]", "[[sources.a]]"):
            with self.subTest(content):
                self.assertIn("must be a table", self.assert_toml_refused("[sources", content))


class WarningTests(ConfigCase):
    def test_an_open_source(self) -> None:
        [warning] = resolve({}, {}).warnings

        self.assertIn("source chatwoot has neither a secret nor a token", warning)

    def test_a_source_that_is_not_open(self) -> None:
        for name in ("secret", "token"):
            self.assertEqual(resolve({name: [SECRET]}, {}).warnings, ())

    def test_names_in_the_environment_that_only_look_like_ours(self) -> None:
        config = resolve(
            {"token": ["x"]},
            {"WEBHOOK_API_REPLICAS": "3", "WEBHOOK_SERVICE_HOST": "h", "WEBHOOK_SECERT": SECRET, "HOME": "/"},
        )

        self.assertEqual(
            [warning.split()[0] for warning in config.warnings],
            ["WEBHOOK_API_REPLICAS", "WEBHOOK_SECERT", "WEBHOOK_SERVICE_HOST"],
        )
        self.assertNotIn(SECRET, repr(config.warnings))

    def test_our_own_names_are_no_reason_to_warn(self) -> None:
        environment = {name: VALUES[option.name][0].text for option in OPTIONS for name in option.environment}

        self.assertEqual(resolve({}, environment).warnings, ())


class OriginTests(ConfigCase):
    def test_the_place_that_a_value_comes_from(self) -> None:
        toml, secret = self.file("queue = 'q'\nport = 1\nprefix = 'p'"), self.file("a", "secret")
        config = resolve(
            {"config": toml, "port": "2", "token": ["t"]},
            {"WEBHOOK_PREFIX": "b", "WEBHOOK_SECRET_FILE": secret, "WEBHOOK_SPOOL": ""},
        )

        for name, origin in (
            ("port", "--port"),
            ("token", "--token"),
            ("prefix", "WEBHOOK_PREFIX"),
            ("secret", "WEBHOOK_SECRET_FILE"),
            ("queue", toml),
            ("spool", DEFAULT),
            ("endpoint", DEFAULT),
        ):
            with self.subTest(name):
                self.assertEqual(config.origins[name], origin)

    def test_of_two_environment_names_the_one_that_counts(self) -> None:
        self.assertEqual(resolve({}, {"PORT": "2"}).origins["port"], "PORT")
        self.assertEqual(resolve({}, {"WEBHOOK_PORT": "1", "PORT": "2"}).origins["port"], "WEBHOOK_PORT")

    def test_every_option_has_one(self) -> None:
        config = resolve({}, {})

        self.assertEqual(config.origins, {option.name: DEFAULT for option in OPTIONS})
        self.assertEqual(
            config.sources[DEFAULT_SOURCE].origins,
            {option.name: DEFAULT for option in OPTIONS if option.per_source},
        )

    def test_a_source_says_what_is_its_own(self) -> None:
        toml = self.file("queue = 'q'\nsecret = 'a'\n[sources.other]\nqueue = 'own'\n")
        origins = resolve({"config": toml}, {"WEBHOOK_EVENTS": "x"}).sources["other"].origins

        self.assertEqual(origins["queue"], f"{toml} [sources.other]")
        self.assertEqual(origins["secret"], toml)
        self.assertEqual(origins["events"], "WEBHOOK_EVENTS")
        self.assertEqual(origins["token"], DEFAULT)


toml_keys = st.one_of(
    st.sampled_from([option.name for option in ALL_OPTIONS]),
    st.sampled_from(["sources", "sources.a", "sources.chatwoot", "nope"]),
    st.text(max_size=5).map(json.dumps),
)
toml_values = st.recursive(
    st.one_of(
        st.text(max_size=8).map(json.dumps),
        st.sampled_from(
            ["true", "nan", "inf", "-0.0", "1979-05-27", "07:32:00", "''", "{}", "[]", "0x1F", "1_0"]
        ),
        st.integers().map(str),
        st.floats().map(repr),
        st.sampled_from([value.toml for values in VALUES.values() for value in values]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.tuples(toml_keys, inner).map(lambda pair: f"{{{pair[0]} = {pair[1]}}}"),
    ),
    max_leaves=4,
)
toml_lines = st.one_of(
    st.tuples(toml_keys, toml_values).map(" = ".join),
    toml_keys.map("[{}]".format),
    st.text(max_size=8),
)
toml_files = st.one_of(st.binary(max_size=40), st.lists(toml_lines, max_size=5).map("\n".join))


class PropertyTests(ConfigCase):
    @given(toml_files)
    def test_whatever_the_file_it_is_a_config_or_refused_with_one_line(self, content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        try:
            config = self.from_toml(data)
        except ConfigError as error:
            self.assertTrue(str(error).isprintable(), repr(str(error)))
        else:
            self.assertIsInstance(config, Config)

    @given(st.sampled_from(OPTIONS), st.one_of(st.text(max_size=20), st.from_regex(r"[0-9.e+-]{1,12}")))
    def test_whatever_the_text_it_is_a_value_or_refused_with_one_line(
        self, option: Option, value: str
    ) -> None:
        try:
            resolve(on_command_line(option, value), {})
        except ConfigError as error:
            self.assertTrue(str(error).startswith(f"--{option.flag}: "))
            self.assertTrue(str(error).isprintable(), repr(str(error)))
