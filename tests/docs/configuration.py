"""docs/configuration.md, made from the options: ``python -m tests.docs.configuration``."""

from __future__ import annotations

from pathlib import Path

from webhookd.config import ALL_OPTIONS, Option

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_HEAD = """\
# Every option

`make docs` writes this page from `webhookd/config.py`. Make changes there.

You can set each option on the command line of `twistd webhookd`, in the environment, or in a TOML file that
`--config` names. The command line overrides the environment, and the environment overrides the file.
`webhookd config` shows each value and its origin. It masks secrets.

* An empty environment variable counts as not set. If an option has two, the first that is set counts.
* A variable `…_FILE` names a file that holds the value, so that no process list shows the secret. Put several
  secrets on separate lines.
* An unknown option, TOML key or value is an error: webhookd does not start, and one line names the cause. An
  unknown `WEBHOOK_…` variable is only a warning, because Compose and Kubernetes set some themselves.

`conf/webhookd.toml` is a sample file with every option and its default.

## Several Chatwoot installations

`/webhook/chatwoot` belongs to the source `chatwoot`. Each further installation is a section of the TOML file,
and has its own path, here `/webhook/chatwoot/branch`. It can set the options marked *per source*. All other
options are shared.

```toml
secret = ["secret of the first installation"]

[sources.branch]
secret = ["secret of the second installation"]
queue = "branch"
events = ["message_created"]
```

## The options

| command line | environment | TOML | default | per source | description |
|---|---|---|---|---|---|
"""


def page() -> str:
    """Return the whole page."""
    return _HEAD + "".join(f"{_row(option)}\n" for option in ALL_OPTIONS)


def _row(option: Option) -> str:
    cells = (
        f"`--{option.flag}`" + (", repeatable" if option.repeatable else ""),
        ", ".join(f"`{name}`" for name in option.variables),
        f"`{option.name}`" if option.name != "config" else "",
        f"`{option.shown_default}`" if option.default else option.default_help,
        "yes" if option.per_source else "",
        option.help,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
