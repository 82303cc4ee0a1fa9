"""``webhookd sign``: the headers that sign a body."""

from __future__ import annotations

import shlex
import time

import click

from webhookd.cli.daemon import webhook_url
from webhookd.cli.deliveries import signature_headers
from webhookd.cli.settings import configured, find_source, secrets_of, source_option, url_option
from webhookd.cli.terminal import json_option, print_json, read_file
from webhookd.config import Config


@click.command()
@click.argument("file", default="-", metavar="[FILE]")
@source_option
@configured("port", "interface", "endpoint", "secret")
@click.option(
    "--timestamp",
    type=click.IntRange(0, 10**12 - 1),
    metavar="SECONDS",
    show_default="now",
    help="Time of the signature, in seconds since 1970.",
)
@click.option("--curl", "as_curl", is_flag=True, help="Print a curl command that sends it.")
@url_option
@json_option
def command(
    settings: Config,
    file: str,
    source: str,
    timestamp: int | None,
    url: str | None,
    *,
    as_curl: bool,
    as_json: bool,
) -> None:
    """Print the headers of a signed request.

    The body is FILE, or the standard input. The first configured secret signs it.
    """
    secret = secrets_of(find_source(settings, source))[0]
    fields = signature_headers(secret, read_file(file), int(time.time()) if timestamp is None else timestamp)
    if as_json:
        print_json(fields)
    elif as_curl:
        words = ["curl", "-i", webhook_url(settings, url, source), "-H", "Content-Type: application/json"]
        for name, value in fields.items():
            words += ["-H", f"{name}: {value}"]
        click.echo(shlex.join([*words, "--data-binary", f"@{file}"]))
    else:
        for name, value in fields.items():
            click.echo(f"{name}: {value}")
