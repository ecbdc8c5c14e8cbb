"""A folder's tokenizer, read from its ``tokenizer.json``: code that the folder names is never looked at."""

from __future__ import annotations

from pathlib import Path

from sana_edge.errors import CheckpointError
from sana_edge.store.folder import read_json, read_text
from sana_edge.store.identify import explain

FILE = "tokenizer.json"


class PromptTokenizer:
    """Turns text into token ids.

    Args:
        folder: has ``tokenizer.json``, and maybe ``tokenizer_config.json``, which says on which side to cut.
        hint: what to do where a file is missing or damaged.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, hint: str = "the model folder is incomplete; download it again") -> None:
        from tokenizers import Tokenizer

        path, config = folder / FILE, folder / "tokenizer_config.json"
        self._hint = hint
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", hint)
        side = read_json(config).get("truncation_side", "right") if config.is_file() else "right"
        self._side = side if side == "left" else "right"
        try:
            self._tokenizer = Tokenizer.from_str(read_text(path))
            # what is stored says how training was batched
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        except BaseException as error:  # plain Exception, and a panic of the library's is none
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            known, hint = explain(path, hint)
            raise CheckpointError(f"{path} cannot be read{known or f': {reason}'}", hint) from error

    def encode(self, text: str, *, limit: int | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``, at most ``limit``.

        Raises:
            CheckpointError: there are none.
        """
        if limit is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(limit, direction=self._side)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise CheckpointError("the tokenizer gives no tokens", self._hint)
        return ids
