"""``sana-edge serve``: a server of pictures on this machine, or a sidecar on stdin and stdout."""

from __future__ import annotations

import argparse
import os
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sana_edge
from sana_edge.cli.arguments import add_load_options, add_prompt_cache
from sana_edge.cli.fastest import fastest
from sana_edge.errors import InvalidInput, SanaError, extra
from sana_edge.progress import Progress, bar, both
from sana_edge.request.loading import LoadOptions
from sana_edge.store import hub
from sana_edge.system.atomic import check_writable

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana
    from sana_edge.serve.service import Service

HELP = "serve pictures to other programs: OpenAI's API, Automatic1111's, jobs, a page; or a sidecar"

HOST, PORT = "127.0.0.1", 8188
# in place of --api-key, which every user of the machine can see
KEY = "SANA_EDGE_API_KEY"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    models = "a name from `models list`, a folder, also one that `export` made, or a repository; may be given"
    models += " several times: the first is the default, and loaded at the start (default: sana-tiny)"
    add("--model", action="append", metavar="NAME", help=models)
    add_load_options(parser)
    add_prompt_cache(parser)
    add("--host", default=HOST, metavar="NAME", help="of the address to listen on (default: %(default)s)")
    add("--port", type=int, default=PORT, metavar="N", help="0 takes a free one (default: %(default)s)")
    key = f"what clients must send; without one only this machine may ask (default: {KEY}, else none)"
    add("--api-key", metavar="KEY", help=key)
    idle = "let a model go that was not used for so long (default: never)"
    add("--idle-unload", type=float, metavar="SECONDS", help=idle)
    add("--queue", type=int, default=16, metavar="N", help="jobs that may wait (default: %(default)s)")
    add("--keep", type=Path, metavar="DIR", help="write every picture to this folder as well")
    add("--open", action="store_true", help="show the page in a browser")
    add("--stdio", action="store_true", help="a sidecar: lines of JSON on stdin and stdout, no address")
    add("--offline", action="store_true", help="never use the network")


def run(arguments: argparse.Namespace) -> None:
    """Print the URL once the default model is loaded, and serve until Ctrl-C."""
    _check(arguments)
    if arguments.stdio:
        from sana_edge.serve import stdio

        stdio.run(_service(arguments, quiet=True))
        return
    with extra("serve", "starlette", "uvicorn", "anyio", "h11", "python_multipart"):
        from sana_edge.serve.server import Server, address, listen
    key = arguments.api_key or os.environ.get(KEY) or None
    service = _service(arguments, quiet=arguments.quiet)
    # first, as it takes no time
    with listen(arguments.host, arguments.port, key) as listening:
        service.load()
        url = address(listening)
        print(url, flush=True)
        if arguments.open:
            webbrowser.open(url)
        if not Server(service, key).answer(listening):
            # the interpreter cannot end around a thread that computes
            os._exit(0)


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    if not 0 <= arguments.port <= 65535:
        raise InvalidInput(f"port is {arguments.port}", "choose 0 to 65535")
    if arguments.queue < 0:
        raise InvalidInput(f"queue is {arguments.queue}", "choose 0 or more")
    idle = arguments.idle_unload
    # NaN is neither
    if idle is not None and not 0 < idle <= threading.TIMEOUT_MAX:
        raise InvalidInput(f"idle-unload is {idle}", "choose seconds above 0")
    if arguments.api_key == "":
        raise InvalidInput("the API key is empty", "leave out --api-key, or give one")
    if arguments.keep is not None:
        if not arguments.keep.is_dir():
            raise InvalidInput(f"{arguments.keep} is no folder", "create it first")
        check_writable(arguments.keep / "sana.png")


def _service(arguments: argparse.Namespace, *, quiet: bool) -> Service:
    from sana_edge.serve.service import Service

    models = _named(arguments.model or ["sana-tiny"])
    loader = _Loader(arguments, quiet=quiet)
    return Service(
        models,
        loader,
        limit=arguments.queue,
        idle=arguments.idle_unload,
        keep=arguments.keep,
        memory=arguments.memory,
    )


def _named(models: list[str]) -> dict[str, str]:
    """What requests call each model: the name of its folder, not where that lies."""
    named: dict[str, str] = {}
    for model in dict.fromkeys(models):
        name = Path(model).resolve().name if os.path.exists(model) else model
        count = 2
        while name in named:
            name, count = f"{name.rpartition('-')[0] if count > 2 else name}-{count}", count + 1
        named[name] = model
    return named


class _Loader:
    """Loads as `generate` does, so that it draws the same pictures."""

    def __init__(self, arguments: argparse.Namespace, *, quiet: bool) -> None:
        self._quiet = quiet
        names = [
            "dtype",
            "int8",
            "backend",
            "device",
            "engines",
            "trust_engine",
            "threads",
            "memory",
            "prompt_cache",
            "offline",
        ]
        options = {name: getattr(arguments, name) for name in names}
        self._options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}

    def __call__(self, model: str, on_progress: Progress, cancel: threading.Event) -> Sana:
        options = {**self._options, "progress": not self._quiet}
        with bar(self._quiet) as shown:
            found = fastest(model, LoadOptions(**options), _unsaid, both(shown, on_progress))
        return sana_edge.Sana.load(found, **options, on_progress=on_progress, cancel=cancel)

    def size(self, model: str) -> int:
        int8 = self._options.get("int8", False)
        try:
            folder = hub.exported(model)
            if folder is None:
                folder = hub.resolve(model, int8=int8, offline=True, progress=False).path
        except SanaError:
            return 0
        files = (file for end in ("safetensors", "data", "onnx") for file in folder.rglob(f"*.{end}"))
        return sum(file.stat().st_size for file in files if file.is_file())


def _unsaid(note: str) -> None:
    """A note that nobody sees: the log of `Sana.load` names the model that is used."""
