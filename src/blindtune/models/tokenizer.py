"""Tokenizes texts or pairs of texts, with the server's tokenizer, to token rows and padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import tokenizers
import torch

from blindtune.errors import ConfigError
from blindtune.models.backbone import Tokens

Text = str | tuple[str, str]


@dataclass(frozen=True)
class TokenRow:
    """One tokenized example, without padding.

    Attributes:
        parts: both texts of a pair, each tokenized as a text of its own; none for a single text.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    parts: tuple[TokenRow, ...] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """The tokenizer of one hosted model.

    A text always has the same tokens, whatever it is tokenized with and however often. The server chooses the
    tokenizer, and one that drops merges at random, or pads to the longest text, would make a text look new.

    Args:
        json: JSON of the `tokenizers` library.
        pad_token_id: the id of padding tokens.
        with_types: whether the model uses token types (BERT's sentence A and B).
    """

    def __init__(self, json: str, *, pad_token_id: int, with_types: bool) -> None:
        self.json = json
        self._backend = tokenizers.Tokenizer.from_str(json)
        self._backend.no_padding()
        self._known: dict[tuple[Text, int], TokenRow] = {}
        self._pad, self._with_types = pad_token_id, with_types

    def rows(self, texts: Sequence[Text], *, max_length: int) -> list[TokenRow]:
        """Tokenizes texts, with the model's special tokens, truncated to `max_length` tokens.

        Of a pair, the longer text is truncated first.

        Raises:
            ConfigError: the special tokens alone are more than `max_length`.
        """
        keys = [(text if isinstance(text, str) else (text[0], text[1]), max_length) for text in texts]
        if unknown := list(dict.fromkeys(key for key in keys if key not in self._known)):
            self._known |= zip(unknown, self._tokenize([text for text, _ in unknown], max_length), strict=True)
        return [self._known[key] for key in keys]

    def _tokenize(self, texts: Sequence[Text], max_length: int) -> list[TokenRow]:
        """Returns the rows of texts that are tokenized for the first time."""
        self._backend.enable_truncation(max_length)
        encodings = self._backend.encode_batch(list(texts))
        longest = max((len(e.ids) for e in encodings), default=0)
        if longest > max_length:  # the library doesn't truncate if the special tokens alone are too many
            raise ConfigError(f"max_length is {max_length}, too few for special tokens.", remedy="Raise max_length.")
        rows = [TokenRow(tuple(e.ids), tuple(e.type_ids)) for e in encodings]
        pairs = {index: text for index, text in enumerate(texts) if not isinstance(text, str)}
        if pairs:
            apart = iter(self.rows([part for pair in pairs.values() for part in pair], max_length=max_length))
            for index in pairs:
                rows[index] = replace(rows[index], parts=(next(apart), next(apart)))
        return rows

    def text(self, ids: Sequence[int]) -> str:
        """Decodes tokens to text, without special tokens."""
        return self._backend.decode(list(ids))

    def pad(self, rows: Sequence[TokenRow]) -> Tokens:
        """Returns a right-padded batch, as long as its longest row."""
        length = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), length), self._pad, dtype=torch.int32)
        types = torch.zeros((len(rows), length), dtype=torch.uint8) if self._with_types else None
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row.ids, dtype=torch.int32)
            if types is not None:
                types[index, : len(row)] = torch.tensor(row.types, dtype=torch.uint8)
        return Tokens(ids, torch.tensor([len(row) for row in rows], dtype=torch.int32), types)
