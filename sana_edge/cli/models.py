"""``sana-edge models``: the models that have a name, downloads, and their removal."""

from __future__ import annotations

import argparse
import json
import sys

from sana_edge.cli.arguments import add_revision
from sana_edge.errors import InvalidInput

HELP = "list the models with a name, download or remove one"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "pull", "rm"), default="list", help="(default: list)")
    add("name", nargs="?", help="the model to pull or remove: a name from the list or a repository")
    add("--force", action="store_true", help="remove without a question")
    add_revision(parser, "what is pulled")
    add("--json", action="store_true", help="list as one JSON array; errors as a JSON object")


def run(arguments: argparse.Namespace) -> None:
    """List, or download or remove and print the folder."""
    from sana_edge.store import hub
    from sana_edge.store.known_models import DECODERS

    action, name, revision = arguments.action, arguments.name, arguments.revision
    if revision is not None and action != "pull":
        arguments.parser.error(f"--revision is of models pull, not of {action}")
    if action == "list":
        if name is not None:
            arguments.parser.error(f"unrecognized arguments: {name}")
        _list(arguments.json)
        return
    if name is None:
        what = "pull" if action == "pull" else "remove"
        raise InvalidInput(f"no model to {what}", "`sana-edge models list` shows the names")
    if action == "rm":
        _remove(name, arguments.force)
    elif name in DECODERS:
        shown = not arguments.quiet
        print(hub.resolve_decoder(name, refresh=True, progress=shown, revision=revision))
    else:
        print(hub.resolve(name, refresh=True, progress=not arguments.quiet, revision=revision).path)


def _list(as_json: bool) -> None:
    from sana_edge.store import catalogue

    models = catalogue.list_models()
    if as_json:
        entries = [
            {
                "name": model.name,
                "origin": model.origin,
                "path": str(model.path) if model.path else None,
                "bytes": model.size,
                "download_bytes": model.info.download if model.info and model.size is None else None,
                "repository": model.info.repository if model.info else None,
                "licence": model.info.licence if model.info else None,
            }
            for model in models
        ]
        print(json.dumps(entries))
        return
    licences: list[str] = []
    for model in models:
        state = f"{model.size / 1e6:.0f} MB" if model.size is not None else "not here"
        if model.size is None and model.info is not None:
            state += f", {model.info.download / 1e9:.1f} GB"
        source = ""
        if model.info is not None:
            if model.info.licence not in licences:
                licences.append(model.info.licence)
            source = f"{model.info.repository} [{licences.index(model.info.licence) + 1}]"
        print(f"{model.name:26} {model.origin:8} {state:16} {source}".rstrip())
    for number, licence in enumerate(licences, start=1):
        print(f"[{number}] licence: {licence}")


def _remove(name: str, force: bool) -> None:
    """Ask, unless forced, and print the folder that is gone."""
    from sana_edge.store import downloads

    found = downloads.find(name)
    if not force:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InvalidInput(f"nobody to ask whether to remove {found.folder}", "add --force")
        what = f"remove {found.repository}, {found.size / 1e6:.0f} MB in {found.folder}"
        print(f"{what}? Other programs may use it, too. [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise InvalidInput(f"{found.repository} is kept", "answer y to remove it")
    downloads.remove(found)
    print(found.folder)
