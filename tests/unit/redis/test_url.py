"""The forms of a Redis URL, those that are none, and that a password shows nowhere."""

from __future__ import annotations

from urllib.parse import quote

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.redis.url import RedisUrl

ONE_HOST = RedisUrl(hosts=(("h", 6379),))

GOOD = {
    "redis://h": ONE_HOST,
    "redis://h/": ONE_HOST,
    "redis://h:": ONE_HOST,
    "redis://h:6379/0": ONE_HOST,
    "redis://h:1/15": RedisUrl(hosts=(("h", 1),), database=15),
    "redis://h:65535": RedisUrl(hosts=(("h", 65535),)),
    "redis://127.0.0.1:6380": RedisUrl(hosts=(("127.0.0.1", 6380),)),
    "redis://[::1]": RedisUrl(hosts=(("::1", 6379),)),
    "redis://[2001:db8::7]:6380/2": RedisUrl(hosts=(("2001:db8::7", 6380),), database=2),
    "redis://:pw@h": evolve(ONE_HOST, password="pw"),
    "redis://user:pw@h": evolve(ONE_HOST, username="user", password="pw"),
    "redis://us%40er:p%3Aw%2F%40%25@h": evolve(ONE_HOST, username="us@er", password="p:w/@%"),
    "redis://user:p@w@h": evolve(ONE_HOST, username="user", password="p@w"),
    "redis://:a:b@h": evolve(ONE_HOST, password="a:b"),
    "redis://:p%C3%A9@h": evolve(ONE_HOST, password="pé"),
    "rediss://h:6380": RedisUrl(hosts=(("h", 6380),), tls=True),
    "rediss://h?ca_file=/etc/ca.pem": RedisUrl(hosts=(("h", 6379),), tls=True, ca_file="/etc/ca.pem"),
    "unix:///run/redis.sock": RedisUrl(socket_path="/run/redis.sock"),
    "unix:///run/my%20redis.sock?db=3": RedisUrl(socket_path="/run/my redis.sock", database=3),
    "unix://:pw@/run/redis.sock": RedisUrl(socket_path="/run/redis.sock", password="pw"),
    "unix://user:pw@/run/redis.sock": RedisUrl(socket_path="/run/redis.sock", username="user", password="pw"),
    "redis://:a[b]c@h": RedisUrl(hosts=(("h", 6379),), password="a[b]c"),
    "redis+sentinel://a/main": RedisUrl(hosts=(("a", 26379),), sentinel_name="main"),
    "redis+sentinel://:pw@a,b:1,[::1]:2/main/4": RedisUrl(
        hosts=(("a", 26379), ("b", 1), ("::1", 2)), sentinel_name="main", password="pw", database=4
    ),
    "embedded:": RedisUrl(embedded=True),
    "embedded:6390": RedisUrl(embedded=True, embedded_port=6390),
}

BAD = (
    "",
    "h",
    "h:6379",
    "127.0.0.1:6379",
    "http://h",
    "REDIS://h",
    "tcp://10.0.0.1:6379",
    "redis:",
    "redis:h",
    "redis://",
    "redis:///0",
    "redis://:6379",
    "redis://h:0",
    "redis://h:65536",
    "redis://h:x",
    "redis://h:-1",
    "redis://h:6379x",
    "redis://h:٣",
    f"redis://h:{5000 * '1'}",
    "redis://h/x",
    "redis://h/-1",
    "redis://h/1.0",
    "redis://h/1/2",
    "redis://h/1000001",
    "redis://a,b",
    "redis://a,b/0",
    "redis://user@h",
    "redis://user:@h",
    "redis://h?db=1",
    "redis://h?ca_file=/etc/ca.pem",
    "rediss://h?cert=/etc/cert.pem",
    "redis://[::1",
    "redis://:a[b@h",
    "redis://:a[b]c@[::1",
    "redis://[::1]6379",
    "redis://::1",
    "redis://::1:6379",
    "redis://fe80::1",
    "redis://[h]:1",
    "redis+sentinel://a",
    "redis+sentinel://a/",
    "redis+sentinel:///main",
    "redis+sentinel://a,/main",
    "redis+sentinel://a/main/x",
    "redis+sentinel://a/main?x=1",
    "unix://run/redis.sock",
    "unix:",
    "unix:///run/redis.sock?db=x",
    "unix:///run/redis.sock?path=x",
    "embedded:0",
    "embedded:x",
    "embedded://",
    "embedded:65536",
)


class GoodUrlTests(SynchronousTestCase):
    def test_every_form(self) -> None:
        for text, url in GOOD.items():
            with self.subTest(text):
                self.assertEqual(RedisUrl.parse(text), url)

    def test_what_is_shown_has_all_but_the_credentials(self) -> None:
        for text, shown in (
            ("redis://user:pw@h", "redis://h:6379/0"),
            ("rediss://:pw@[::1]:1/2?ca_file=x", "rediss://[::1]:1/2"),
            ("unix://:pw@/run/r.sock?db=3", "unix:///run/r.sock?db=3"),
            ("redis+sentinel://:pw@a,[::1]:2/main/4", "redis+sentinel://a:26379,[::1]:2/main/4"),
            ("embedded:6390", "embedded:"),
        ):
            with self.subTest(text):
                self.assertEqual(str(RedisUrl.parse(text)), shown)

    def test_what_is_shown_leads_to_the_same_place(self) -> None:
        for text, url in GOOD.items():
            with self.subTest(text):
                place = evolve(url, username=None, password=None, ca_file=None, embedded_port=None)
                self.assertEqual(RedisUrl.parse(str(url).replace(" ", "%20")), place)


class BadUrlTests(SynchronousTestCase):
    def test_each_is_refused_with_one_line(self) -> None:
        for text in BAD:
            with self.subTest(text[:60]):
                error = self.assertRaises(ValueError, RedisUrl.parse, text)
                self.assertTrue(str(error))
                self.assertTrue(str(error).isprintable())

    def test_a_name_of_another_scheme_is_told_which_there_are(self) -> None:
        error = self.assertRaises(ValueError, RedisUrl.parse, "tcp://h")
        for scheme in ("redis", "rediss", "unix", "redis+sentinel", "embedded"):
            self.assertIn(scheme, str(error))


class SecrecyTests(SynchronousTestCase):
    def test_no_piece_of_a_password_shows_in_the_error_where_its_special_characters_were_not_encoded(
        self,
    ) -> None:
        for password in (
            "s3cret/s3cret",
            "s3cret?s3cret=s3cret",
            "?ca_file=s3cret&s3cret=1",
            "s3cret#s3cret",
            "s3cret[s3cret",
            "s3cret]s3cret",
            "s3cret[s3cret]s3cret",
            "[s3cret]",
            "s3cret℀s3cret",  # which urllib takes for "a/c", and repeats all of it
            "s3cret:s3cret/s3cret",
        ):
            for form in (
                "redis://:{}@h/x",
                "rediss://user:{}@h/x",
                "unix://:{}@run?x",
                "redis+sentinel://:{}@a",
            ):
                text = form.format(password)
                with self.subTest(text):
                    error = self.assertRaises(ValueError, RedisUrl.parse, text)
                    self.assertNotIn("s3cret", str(error))


passwords = st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"]))
pieces = st.sampled_from(
    ["/", "?", "#", "[", "]", "@", ":", ",", "%", "=", "&", "h", "0", "6379", "s3cret", "℀", "\n"]
)
rubbish = st.builds(
    lambda scheme, rest: scheme + "".join(rest),
    st.sampled_from(["redis://", "rediss://", "unix://", "redis+sentinel://", "embedded:", "redis:", ""]),
    st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=12),
)


class PropertyTests(SynchronousTestCase):
    @given(passwords, passwords)
    def test_percent_encoding_takes_any_name_and_password(self, username: str, password: str) -> None:
        url = RedisUrl.parse(f"redis://{quote(username, safe='')}:{quote(password, safe='')}@h:1/2")

        self.assertEqual((url.username, url.password), (username, password))
        self.assertEqual((url.hosts, url.database), ((("h", 1),), 2))

    @given(rubbish)
    def test_whatever_the_text_it_is_a_url_or_refused_with_one_line(self, text: str) -> None:
        try:
            url = RedisUrl.parse(text)
        except ValueError as error:
            self.assertTrue(str(error).isprintable())
            self.assertNotIn("s3cret", str(error))
        else:
            self.assertEqual([bool(url.hosts), url.socket_path is not None, url.embedded].count(True), 1)
