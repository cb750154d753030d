"A page for each command of `dora-nb`, from its parser."

import argparse
import os

from api import plain

from dora_nb.command.parser import COMMANDS, parser

os.environ["COLUMNS"] = "80"  # of the usage


def _entry(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    "Return one option, or one positional argument, as a directive."
    values = command._get_formatter()._format_args(action, action.metavar or action.dest.upper())
    heads = [f"{name} {values}".strip() for name in action.option_strings or [""]]
    text = (action.help or "") % (vars(action) | {"prog": command.prog})
    return f"```{{option}} {', '.join(heads)}\n{plain(text)}\n```\n"


def _page(name: str, command: argparse.ArgumentParser) -> str:
    usage = command.format_usage().removeprefix("usage: ")
    lines = [f"# dora-nb {name}\n", f"{plain(command.description or '')}\n"]
    lines.append(f"```{{code-block}} text\n{usage}```\n\n```{{program}} dora-nb {name}\n```\n")
    for group in command._action_groups:
        if actions := [action for action in group._group_actions if action.help != argparse.SUPPRESS]:
            lines += [f"## {group.title.capitalize()}\n", *(_entry(command, action) for action in actions)]
    return "\n".join(lines)


def command_pages() -> dict[str, str]:
    "Return the page of each command, in MyST."
    return {name: _page(name, command) for name, command in parser(*COMMANDS).commands.items()}


def commands_table() -> str:
    "Return what each command does, as Markdown."
    rows = (f"| [`{name}`]({name}.md) | {plain(function.__doc__)} |" for name, (function, _) in COMMANDS.items())
    return "\n".join(["| command | |", "|---|---|", *rows])


def exit_status() -> str:
    "Return what the exit status of a command means, a line for each, as Markdown."
    meanings = parser().epilog.removeprefix("Exit status: ").rstrip(".").split("; ")
    return "\n".join(f"- `{number}` {plain(meaning)}" for number, meaning in (m.split(" ", 1) for m in meanings))
