"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sana_edge.errors import InvalidInput, SanaError

_HINT = "check the free space and the permissions, or choose another --output"


def check_output(output: Path, *, force: bool, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """See that a folder can be made at ``output``, or an empty one replaced, before any work.

    Args:
        force: replace a folder of this kind; an empty one is taken without, any other never.
        kind: what the folder is called in messages, such as "model folder".
        is_kind: whether a folder is one.

    Raises:
        InvalidInput: something is there that is not replaced.
        SanaError: the folder above cannot be written.
    """
    try:
        exists = os.path.lexists(output)
        if exists and (output.is_symlink() or not output.is_dir()):
            raise InvalidInput(f"{output} exists and is not a folder", "choose another --output")
        taken = exists and any(output.iterdir())
        if taken and not is_kind(output):
            raise InvalidInput(f"{output} exists, is not empty and no {kind}", "choose another --output")
    except OSError as error:
        raise SanaError(f"cannot read {output}: {error}", _HINT) from error
    # said only where it helps
    if taken and not force:
        raise InvalidInput(f"{output} exists", "choose another --output, or add --force")
    with _temporary(output):
        pass


@contextlib.contextmanager
def new_folder(
    output: Path, *, force: bool = False, kind: str, is_kind: Callable[[Path], bool]
) -> Iterator[Path]:
    """Give an empty folder beside ``output`` to write in; at the end, and only then, it gets that name.

    Arguments are those of `check_output`.

    Raises:
        InvalidInput, SanaError: as `check_output`; or a file could not be written inside.
    """
    check_output(output, force=force, kind=kind, is_kind=is_kind)
    with _temporary(output) as temporary:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        old = temporary / "old"
        try:
            if os.path.lexists(output):
                check_output(output, force=force, kind=kind, is_kind=is_kind)
                os.rename(output, old)
            os.rename(folder, output)
        except BaseException:
            if old.exists() and not os.path.lexists(output):
                os.rename(old, output)
            raise


@contextlib.contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
            yield Path(name)
    except OSError as error:
        raise SanaError(f"cannot write {output}: {error}", _HINT) from error
