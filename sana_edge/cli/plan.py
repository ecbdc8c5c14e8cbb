"""``sana-edge plan``: whether a model fits this machine, and how long a picture takes, without loading it."""

from __future__ import annotations

import argparse
import json

from sana_edge.cli.arguments import add_load_options, add_revision, size, tile
from sana_edge.cli.forecast import Forecast, forecast
from sana_edge.plan.memory import Order
from sana_edge.request.loading import LoadOptions
from sana_edge.request.request import Request
from sana_edge.system.memory import shown

HELP = "say whether a model fits this machine and how long a picture takes, without loading it"

_WAYS: dict[Order, str] = {
    "together": "all of it stays in memory",
    "in turn": "one network after the other is loaded, for each picture",
    "in turn, in tiles": "one network after the other, and the picture in pieces",
}
_NAMES = {"text": "text encoder", "encoder": "encoder (image)"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    names = "a name from `models list`, also one that is not downloaded, a folder, or an exported folder"
    add("model", nargs="?", default="sana-tiny", metavar="MODEL", help=f"{names} (default: sana-tiny)")
    add("--size", type=size, metavar="WxH", help="in pixels (default: the model's native size)")
    add("--exact-size", action="store_true", help="draw at just this size, multiples of 32")
    add("--steps", type=int, metavar="N", help="denoising steps (default: 20, or 2 for Sprint models)")
    add("--guidance", type=float, metavar="F", help="1 halves the work of a step (default: 4.5)")
    add("--tile", type=tile, metavar="N|off", help="decode in tiles of so many pixels, or never in tiles")
    add("--image", action="store_true", help="a picture to start from is encoded, too")
    add_load_options(parser)
    add_revision(parser)
    add("--decoder", metavar="NAME|DIR|FILE", help="an autoencoder in place of the model's own")
    add("--no-probe", action="store_true", help="time nothing: memory alone")
    add("--json", action="store_true", help="print one JSON object, for programs")


def run(arguments: argparse.Namespace) -> None:
    """Print the forecast."""
    request = Request(
        "a picture",
        size=arguments.size,
        exact_size=arguments.exact_size,
        steps=arguments.steps,
        guidance=arguments.guidance,
        tile=arguments.tile,
        seed=0,
    )
    options = LoadOptions(
        device=arguments.device,
        dtype=arguments.dtype or "auto",
        int8=bool(arguments.int8),
        backend=arguments.backend or "auto",
        engines=arguments.engines,
        offline=True,
        revision=arguments.revision,
        decoder=arguments.decoder,
        threads=arguments.threads,
        memory=arguments.memory,
    )
    found = forecast(arguments.model, request, options, image=arguments.image, probe=not arguments.no_probe)
    print(json.dumps(found.to_dict()) if arguments.json else report(found))


def report(found: Forecast) -> str:
    """The forecast for people."""
    drawn = "{}x{}".format(*found.drawn)
    asked = "" if found.drawn == found.size else ", for {}x{}".format(*found.size)
    lines = [
        f"{found.model} at {drawn}{asked}, {found.steps} steps, by {found.backend} on {found.place}"
        f" ({found.kinds})",
        "",
        f"{'':18} {'weights':>10} {'loading':>10} {'working':>10} {'peak':>10}",
        f"{'libraries':18} {shown(found.base):>10}",
    ]
    for stage in found.stages:
        sizes = (stage.weights, stage.loading, stage.working, stage.peak)
        name = _NAMES.get(stage.name, stage.name)
        lines.append(f"{name:18} " + " ".join(f"{shown(count) if count else '-':>10}" for count in sizes))
    lines += ["", *_verdict(found)]
    if found.download:
        lines.append(f"To download: {shown(found.download)}, which then lie on the disk.")
    else:
        lines.append(f"Nothing to download: {shown(found.disk)} are on the disk.")
    if found.seconds:
        total = sum(found.seconds.values())
        parts = ", ".join(f"{name} {value:.2g} s" for name, value in found.seconds.items())
        lines.append(f"A picture takes about {_time(total)} here once the model is loaded ({parts}).")
    lines += [f"note:  {note}" for note in found.notes]
    return "\n".join(lines)


def _verdict(found: Forecast) -> list[str]:
    free = "" if found.limit is None else f" of {shown(found.limit)} that may be taken"
    if found.way is None:
        lines = [f"No: it needs {shown(found.peak)}{free}."]
    else:
        lines = [f"Yes: {shown(found.peak)}{free}; {_WAYS[found.way]}."]
    if found.proposals:
        lines.append("What would fit:" if found.way is None else "What would let all of it stay in memory:")
        width = max(len(proposal.options) for proposal in found.proposals)
        for each in found.proposals:
            lines.append(f"  {each.options:{width}}  {shown(found.base + each.peak):>9}  {each.why}")
    elif found.way is None:
        lines.append("Nothing that was tried fits: not INT8, smaller decoders, tiles or sizes.")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
