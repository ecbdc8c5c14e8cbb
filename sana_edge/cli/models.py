"""``sana-edge models``: the models that have a name, and downloads."""

from __future__ import annotations

import argparse

from sana_edge.errors import InvalidInput

HELP = "list the models with a name, or download one"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("action", nargs="?", choices=("list", "pull"), default="list", help="(default: list)")
    parser.add_argument("name", nargs="?", help="the model to pull: a name from the list or a repository")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """List, or download and print the folder."""
    from sana_edge.store import hub
    from sana_edge.store.known_models import DECODERS

    if arguments.action == "pull":
        if arguments.name is None:
            raise InvalidInput("no model to pull", "`sana-edge models list` shows the names")
        if arguments.name in DECODERS:
            print(hub.resolve_decoder(arguments.name, refresh=True, progress=not arguments.quiet))
            return
        print(hub.resolve(arguments.name, refresh=True, progress=not arguments.quiet).path)
        return
    if arguments.name is not None:
        arguments.usage_error(f"unrecognized arguments: {arguments.name}")
    licences: list[str] = []
    for model in hub.list_models():
        state = f"{model.size / 1e6:.0f} MB" if model.size is not None else "not downloaded"
        source = ""
        if model.info is not None:
            if model.info.licence not in licences:
                licences.append(model.info.licence)
            source = f"{model.info.repository} [{licences.index(model.info.licence) + 1}]"
        print(f"{model.name:26} {model.origin:8} {state:15} {source}".rstrip())
    for number, licence in enumerate(licences, start=1):
        print(f"[{number}] licence: {licence}")
