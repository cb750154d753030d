"A page for each command of `dora-nb`, from its parser."

import argparse
import os

from api import plain

from dora_nb.command.main import COMMANDS, parser

os.environ["COLUMNS"] = "80"  # of the usage


def _parsers() -> dict[str, argparse.ArgumentParser]:
    "Return the parser of each command, with all its options."
    found = {}
    for name in COMMANDS:
        (sub,) = (a for a in parser(name)._actions if isinstance(a, argparse._SubParsersAction))
        found[name] = sub.choices[name]
        for action in found[name]._actions:
            if action.choices and not action.metavar:
                action.metavar = action.dest.upper()  # the choices are listed below it
    return found


def _entry(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    "Return one option, or one positional argument, as a directive."
    formatter = command._get_formatter()
    names = action.option_strings or [formatter._format_args(action, action.metavar or action.dest)]
    value = (
        formatter._format_args(action, action.metavar or action.dest.upper())
        if action.option_strings and action.nargs != 0
        else ""
    )
    heads = ", ".join(f"{name} {value}".strip() for name in names)
    text = (action.help or "") % (vars(action) | {"prog": command.prog}) if action.help else ""
    choices = f" One of {', '.join(f'`{c}`' for c in action.choices)}." if action.choices else ""
    return f"```{{option}} {heads}\n{plain(text)}{'.' if choices else ''}{choices}\n```\n"


def command_pages() -> dict[str, str]:
    "Return the page of each command, in MyST."
    pages = {}
    for name, command in _parsers().items():
        lines = [f"# dora-nb {name}\n", f"{plain(command.description or '')}\n"]
        usage = command.format_usage().removeprefix("usage: ")
        lines.append(f"```{{code-block}} text\n{usage}```\n\n```{{program}} dora-nb {name}\n```\n")
        for group in command._action_groups:
            if actions := [a for a in group._group_actions if a.help != argparse.SUPPRESS]:
                lines.append(f"## {group.title.capitalize()}\n")
                lines += [f"{plain(group.description)}\n"] if group.description else []
                lines += [_entry(command, a) for a in actions]
        pages[name] = "\n".join(lines)
    return pages


def summaries() -> dict[str, str]:
    "Return what each command does, in a line of Markdown."
    return {name: plain(function.__doc__ or "") for name, (function, _) in COMMANDS.items()}
