"""The ``sana-edge`` command: its subcommands, errors and exit codes. What it does lives in the library."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import sana_edge
from sana_edge.cli import build, convert, doctor, export, generate, models, quantize
from sana_edge.cli.arguments import SIZE
from sana_edge.errors import SanaError
from sana_edge.memory import memory_errors
from sana_edge.threads import wait_passively

# each has HELP, add_options(parser) and run(arguments)
COMMANDS = {
    "generate": generate,
    "models": models,
    "convert": convert,
    "quantize": quantize,
    "export": export,
    "build": build,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    wait_passively(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # a file name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        with memory_errors("this command"):
            arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # nobody reads on; what is still buffered must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SanaError as error:
        _report(error.message, error.hint, arguments.verbose)
        return 1
    except Exception as error:  # also what nobody foresaw is one line to the user
        message = " ".join(f"{type(error).__name__}: {error}".split())
        _report(message, "run it again with -v to see where this comes from", arguments.verbose)
        return 1
    return 0


def _joined(argv: Sequence[str]) -> list[str]:
    """Write ``--size -64x64`` as one argument, or argparse would take its value for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined[-1:] == ["--size"] and SIZE.fullmatch(argument):
            argument = f"{joined.pop()}={argument}"
        joined.append(argument)
    return joined


def _report(message: str, hint: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log on stderr, and show tracebacks")
    common.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    parser = argparse.ArgumentParser(
        prog="sana-edge", description="SANA text-to-image: from a prompt to a picture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sana_edge.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, parents=[common], allow_abbrev=False
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser
