"""``webhookd completion``: what makes a shell complete the command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from webhookd.cli.terminal import WrongUse


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    r"""Print what makes a shell complete this command.

    \b
    bash, in ~/.bashrc:     eval "$(webhookd completion bash)"
    zsh, in ~/.zshrc:       eval "$(webhookd completion zsh)"
    fish:  webhookd completion fish > ~/.config/fish/completions/webhookd.fish
    """
    completion = get_completion_class(shell)
    root = context.find_root()
    if completion is None:
        raise WrongUse(f"{shell} is not supported")
    click.echo(completion(root.command, {}, "webhookd", "_WEBHOOKD_COMPLETE").source())
