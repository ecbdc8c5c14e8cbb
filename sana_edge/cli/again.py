"""``generate --from``: what the command line leaves open is taken from a picture that was made before."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sana_edge.errors import InvalidInput
from sana_edge.image import read_metadata
from sana_edge.request.request import Request
from sana_edge.store.catalogue import bundled_names
from sana_edge.store.known_models import DECODERS, KNOWN
from sana_edge.system.json_values import shown

# the options that a picture's metadata may set have no default of their own, but these
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "exact_size": False,
    "variation": (),
    "int8": False,
    "model": "sana-tiny",
    "dtype": "auto",
    "backend": "auto",
}
# of how the model was loaded
_LOADED = ("model", "dtype", "backend", "decoder", "int8")


def fill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill in the options that were not given; returns those that the picture of ``--from`` has set.

    Raises:
        InvalidInput: the file has no metadata, or its metadata is not what sana-edge writes.
    """
    taken: dict[str, Any] = {}
    if arguments.made is not None:
        metadata = read_metadata(arguments.made)
        if "quantization" in metadata:
            metadata["int8"] = True
        # a stranger's file sets nothing else
        known = {*(field.name for field in dataclasses.fields(Request)), *_LOADED}
        left_open = {name for name in known if vars(arguments).get(name, "") is None}
        taken = {name: metadata[name] for name in left_open if metadata.get(name) is not None}
        for name in taken.keys() & set(_LOADED):
            if not isinstance(taken[name], bool if name == "int8" else str):
                raise InvalidInput(
                    f"{arguments.made} has the {name} {shown(taken[name])}", f"give --{name} yourself"
                )
        if any(name in taken and not _is_known(taken[name]) for name in ("model", "decoder")):
            # the user has not asked for this download, and may not have seen the name
            arguments.offline = True
    for name, value in {**DEFAULTS, **taken}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return taken


def _is_known(model: str) -> bool:
    """Whether it is a model of the tables, by its name or its repository."""
    table = {**KNOWN, **DECODERS}
    named = model in table or any(model == info.repository for info in table.values())
    return named or model in bundled_names()
