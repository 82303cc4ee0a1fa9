"""docs/configuration.md, made from the options themselves: ``python -m tests.docs.configuration``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from webhookd.config import ALL_OPTIONS, Option

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_HEAD = """\
# Every option

`make docs` wrote this page from `webhookd/config.py`: change it there.

Each option can be given on the command line of `twistd webhookd`, in the environment, or in a TOML file,
which `--config` names. The command line wins over the environment, and the environment over the file.
`webhookd config` shows what came of it, and from where each value is; secrets are masked.

* An environment variable that is empty counts as not set. Where there are two, the first that is set counts.
* `…_FILE` names a file that holds the value, so that a secret is in no process list; several secrets stand on
  a line each.
* An option, a TOML key or a value that webhookd does not know keeps it from starting, with one line that says
  which. An unknown `WEBHOOK_…` name in the environment is only a warning, because Compose and Kubernetes set
  some of their own.

`conf/webhookd.toml` is a file with every option and its default.

## Several Chatwoot installations

`/webhook/chatwoot` is the source `chatwoot`. Each further installation is a section of the TOML file, and has
a path of its own, here `/webhook/chatwoot/branch`. It may set the options marked *per source*; all else is as
above it.

```toml
secret = ["that of the first installation"]

[sources.branch]
secret = ["that of the second"]
queue = "branch"
events = ["message_created"]
```

## The options

| command line | environment | TOML | default | per source | what it is |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(f"{_row(option)}\n" for option in ALL_OPTIONS)


def _row(option: Option) -> str:
    cells = (
        f"`--{option.flag}`" + (", several times" if option.repeatable else ""),
        ", ".join(f"`{name}`" for name in _environment(option)),
        f"`{option.name}`" if option.name != "config" else "",
        _default(option),
        "yes" if option.per_source else "",
        _explanation(option)[0],
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _environment(option: Option) -> tuple[str, ...]:
    """Its names in the environment, the first that is set counts."""
    files = tuple(f"{name}_FILE" for name in option.environment) if option.secret else ()
    return option.environment + files


def _default(option: Option) -> str:
    """The default with its unit; what the help says in brackets where there is no value."""
    if isinstance(option.default, Mapping):
        return f"`{json.dumps(option.default)}`"
    if option.default in (None, "", ()):
        return _explanation(option)[1] or "none"
    return f"`{option.default}`" + (f" {option.unit}" if option.unit else "")


def _explanation(option: Option) -> tuple[str, str]:
    """The help without the default that may stand in brackets at its end, and that default."""
    match = re.fullmatch(r"(.*?)(?: \[(.*)\])?", option.help)
    if match is None:
        raise ValueError(f"the help of {option.name} has more than one line")
    return match[1], match[2] or ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
