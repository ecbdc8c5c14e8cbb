"""``generate --from``: what the command line leaves open is taken from a picture that was made before."""

from __future__ import annotations

import argparse
from typing import Any

from sana_edge.errors import InvalidInput
from sana_edge.image import read_metadata

# the options that a picture's metadata may set have no default of their own, but these
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "exact_size": False,
    "int8": False,
    "model": "sana-tiny",
    "dtype": "auto",
    "backend": "auto",
}


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
        known = {name for name, value in vars(arguments).items() if value is None}
        taken = {name: value for name, value in metadata.items() if name in known and value is not None}
        for name in ("model", "dtype", "backend", "decoder"):
            if not isinstance(taken.get(name, ""), str):
                raise InvalidInput(
                    f"{arguments.made} has the {name} {taken[name]!r}", f"give --{name} yourself"
                )
    for name, value in (*DEFAULTS.items(), *taken.items()):
        if getattr(arguments, name) is None:
            setattr(arguments, name, taken.get(name, value))
    return taken
