"""``webhookd completion``: click's own completion scripts."""

from __future__ import annotations

import click
from click.shell_completion import shell_complete


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script that lets a shell complete this command.

    For bash or zsh, add this to ~/.bashrc or ~/.zshrc: eval "$(webhookd completion bash)", or zsh.

    For fish: webhookd completion fish > ~/.config/fish/completions/webhookd.fish
    """
    root = context.find_root().command
    context.exit(shell_complete(root, {}, "webhookd", "_WEBHOOKD_COMPLETE", f"{shell}_source"))
