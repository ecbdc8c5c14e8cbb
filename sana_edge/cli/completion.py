"""``sana-edge completion``: scripts that let a shell complete the command's words, made from its parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

HELP = "print a script that completes the command in bash, zsh or fish"

_HOW = {
    "bash": '# to use it: eval "$(sana-edge completion bash)", for example in ~/.bashrc',
    "zsh": '# to use it: eval "$(sana-edge completion zsh)", for example in ~/.zshrc',
    "fish": "# to use it: sana-edge completion fish | source, for example in ~/.config/fish/config.fish",
}


@dataclass(frozen=True)
class _Option:
    """An option, or a positional argument, which has no names; ``words`` are its values where known."""

    names: tuple[str, ...]
    takes_value: bool
    words: tuple[str, ...]
    help: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("shell", choices=tuple(_HOW), help="the shell")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    parsers = _commands(arguments.whole)
    commands = {name: (parser.description or "", list(_options(parser))) for name, parser in parsers}
    script = _fish(commands) if arguments.shell == "fish" else _bash(commands)
    if arguments.shell == "zsh":
        script = f"autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n{script}"
    print(f"{_HOW[arguments.shell]}\n{script}")


def _commands(whole: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _options(parser: argparse.ArgumentParser) -> Iterator[_Option]:
    from sana_edge.store.catalogue import bundled_names
    from sana_edge.store.known_models import DECODERS, KNOWN

    models = (*bundled_names(), *KNOWN)
    for action in (action for action in parser._actions if action.help != argparse.SUPPRESS):
        words = tuple(map(str, action.choices or ()))
        if action.dest in ("model", "models", "base", "name", "against"):
            words = models
        if action.dest == "decoder":
            words = tuple(DECODERS)
        help_text = (action.help or "").partition(" (default")[0].partition(";")[0]
        yield _Option(tuple(action.option_strings), action.nargs != 0, words, help_text)


def _bash(commands: dict[str, tuple[str, list[_Option]]]) -> str:
    """A function of bash, which zsh runs as well; files are completed where nothing else is known."""
    cases = []
    for name, (_, options) in commands.items():
        flags = " ".join(flag for option in options for flag in option.names)
        positional = " ".join(word for option in options if not option.names for word in option.words)
        values = "\n".join(
            f'      "{name} {flag}") words="{" ".join(option.words)}"; known=1 ;;'
            for option in options
            if option.takes_value
            for flag in option.names
        )
        cases.append((name, flags, positional, values))
    flags = "\n".join(f'    {name}) flags="{flags}"; words="{words}" ;;' for name, flags, words, _ in cases)
    values = "\n".join(values for *_, values in cases if values)
    return f"""_sana_edge() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  local flags="" words="" known=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))
    return
  fi
  case "$command" in
{flags}
  esac
  case "$command $before" in
{values}
  esac
  if [ -z "$known" ] && [ "${{word#-}}" != "$word" ]; then
    words="$flags"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _sana_edge sana-edge"""


def _fish(commands: dict[str, tuple[str, list[_Option]]]) -> str:
    lines = [
        f"complete -c sana-edge -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}"
        for name, (text, _) in commands.items()
    ]
    for name, (_, options) in commands.items():
        start = f"complete -c sana-edge -n '__fish_seen_subcommand_from {name}'"
        for option in options:
            names = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            words = f" -a {_quoted(' '.join(option.words))}" if option.words else ""
            value = " -r" if option.names and option.takes_value else ""
            if names or words:
                lines.append(f"{start}{names}{value}{words} -d {_quoted(option.help)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """In single quotes, as fish reads them."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
