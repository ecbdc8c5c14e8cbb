"""The ``sana-edge`` command: its subcommands, errors and exit codes. What it does lives in the library."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import sana_edge
from sana_edge.cli import (
    bench,
    build,
    completion,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    models,
    plan,
    quantize,
    serve,
)
from sana_edge.cli.arguments import SIZE, Parser, UsageError
from sana_edge.errors import SanaError, one_line
from sana_edge.system.atomic import hint_of
from sana_edge.system.memory import memory_errors
from sana_edge.system.threads import termination_as_interrupt, wait_passively

# what a pipe without a reader, a full disk and a stream that was opened for reading say
_OF_STREAMS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)

# each has HELP, add_options(parser) and run(arguments)
COMMANDS = {
    "generate": generate,
    "serve": serve,
    "plan": plan,
    "models": models,
    "convert": convert,
    "quantize": quantize,
    "export": export,
    "build": build,
    "evaluate": evaluate,
    "bench": bench,
    "doctor": doctor,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for usage, 130 for Ctrl-C.

    With ``--json`` an error is also an object {"error", "hint"} on stdout.
    """
    wait_passively(os.environ)
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # a file name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    ended: SystemExit | None = None
    lost: OSError | None = None
    code = 1
    try:
        code = _run(_joined(sys.argv[1:] if argv is None else argv))
    except SystemExit as error:
        ended = error
    except OSError as error:  # of a stream
        lost = error
    except KeyboardInterrupt:  # a second one
        code = 130
    # help, too, may be longer than what reads it
    lost = _flush() or lost
    if lost is not None:
        if not isinstance(lost, BrokenPipeError):
            with contextlib.suppress(OSError):
                print(f"error: cannot write what is said: {lost.strerror}", file=sys.stderr)
                print(f"hint:  {hint_of(lost)}", file=sys.stderr, flush=True)
        return code or 1
    if ended is not None:
        raise ended
    return code


def _run(words: list[str]) -> int:
    """Run a command, say what was wrong, and return the exit code.

    Raises:
        OSError: what is said cannot be written.
    """
    as_json, verbose = "--json" in words, False
    try:
        arguments, unknown = _parser().parse_known_args(words)
        if unknown:
            arguments.parser.refuse(unknown)
        arguments.words = words[1:]
        # of `bench` a file
        as_json = getattr(arguments, "json", as_json) is True
        verbose = arguments.verbose
        if verbose:
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        else:
            logging.getLogger("sana_edge.system").addHandler(_NOTES)
        with termination_as_interrupt(), memory_errors("this command"):
            arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        error.parser.print_usage(sys.stderr)
        print(f"{error.parser.prog}: error: {error.message}", file=sys.stderr)
        _print_json(error.message, f"`{error.parser.prog} --help` shows the options", as_json)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _print_json("interrupted", "", as_json)
        return 130
    except SanaError as error:
        _report(error.message, error.hint, verbose, as_json)
        return 1
    except Exception as error:  # also what nobody foresaw is one line to the user
        if isinstance(error, OSError) and error.filename is None and error.errno in _OF_STREAMS:
            raise
        _report(*_words(error), verbose, as_json)
        return 1
    return 0


def _words(error: Exception) -> tuple[str, str]:
    """What to say of an error that is no `SanaError`, and a hint."""
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"cannot use {error.filename}: {error.strerror}"), hint_of(error)
    if isinstance(error, FileNotFoundError):
        # the current folder has gone, or there is none for temporary files
        hint = "go to a folder that is there, and let TMPDIR be one that can be written"
        return one_line(error.strerror or str(error)), hint
    message = one_line(" ".join(f"{type(error).__name__}: {error}".split()))
    if library := _imported(error):
        hint = f"see the variables of the environment that {library} reads, or install it again"
        return one_line(f"cannot load {library}: {message}"), hint
    return message, "run it again with -v to see where this comes from"


def _imported(error: Exception) -> str:
    """The library that failed while it was imported; empty where none was."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    modules = [f.f_globals.get("__name__", "") for f in frames if f.f_code.co_name == "<module>"]
    found = str(modules[-1]).partition(".")[0] if modules else ""
    return "" if found in ("__main__", "sana_edge") else found


def _flush() -> OSError | None:
    """Write all that was said; what cannot be must not fail again when the interpreter ends."""
    lost: OSError | None = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            lost = lost or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return lost


def _open_streams() -> None:
    """Put the null device in place of streams that were closed (``2>&-``) or are missing (a GUI's).

    The number of a closed one would go to the next file that is opened, which then gets what C libraries
    write there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not stream.closed:
            continue
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free, which is this one
            os.open(os.devnull, os.O_RDWR)
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _joined(argv: Sequence[str]) -> list[str]:
    """Write ``--size -64x64`` as one argument, or argparse would take its value for an option."""
    joined: list[str] = []
    for argument in argv:
        # of several, as `bench` takes them, the others would be no sizes then
        if joined[-1:] == ["--size"] and argument.startswith("-") and SIZE.fullmatch(argument):
            argument = f"{joined.pop()}={argument}"
        joined.append(argument)
    return joined


class _Notes(logging.Handler):
    """What the writer found of dead processes is said without -v too."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"note:  {record.getMessage()}", file=sys.stderr)


_NOTES = _Notes()


def _report(message: str, hint: str, verbose: bool, as_json: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)
    _print_json(message, hint, as_json)


def _print_json(message: str, hint: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "hint": hint}), flush=True)


def _parser() -> Parser:
    """The parser of the whole command line; a subcommand's own is in its ``parser``."""
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log on stderr, and show tracebacks")
    common.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    parser = Parser(
        prog="sana-edge", description="SANA text-to-image: from a prompt to a picture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sana_edge.__version__}")
    # what `completion` describes
    parser.set_defaults(whole=parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, parents=[common], allow_abbrev=False
        )
        module.add_options(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
