"""Texts with masks, and what may stand in their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.clean import encode_text
from trainer.data.row_arrays import StoredRow, padded
from trainer.data.row_encoder import joins_spaces
from trainer.data.rows_manifest import TextForm
from trainer.serving.options import RequestFault
from trainer.serving.predictions import softmax
from trainer.serving.reading import DEFAULT_NORMALIZE, Arrays, RowReader, load_stored


class MaskReader(RowReader):
    """Reads texts that name the mask token, as training reads them: without what a tokenizer puts around a text."""

    def __init__(self, folder: Path, max_length: int | None, normalize: TextForm | None = None) -> None:
        """Load the tokenizer.

        Args:
            folder: where it is.
            max_length: the most tokens that the model reads; None for any number.
            normalize: Unicode form of the texts that it was trained on; None where nobody says.

        Raises:
            UserError: there is none, or it has no mask token.
        """
        self._encoder, self.tokenizer, controls = load_stored(folder)
        mask = controls.get("mask_token")
        mask_id = None if mask is None else self.tokenizer.token_to_id(mask)
        if mask is None or mask_id is None:
            raise UserError(f"{folder} has a tokenizer without a mask token, of which a masked model is asked.")
        self.mask, self._mask_id = mask, mask_id
        self._max_length = max_length
        self._normalize = normalize or DEFAULT_NORMALIZE
        self._joins_spaces = joins_spaces(self._encoder)
        # What stands for no text is no answer, nor is an id that only fills up the embedding.
        added = self.tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        special |= {self.tokenizer.token_to_id(name) for name in controls.values()}
        self.text_ids = np.array(sorted(set(self.tokenizer.get_vocab().values()) - special))

    def store(self, rows: Sequence[Any]) -> list[StoredRow]:
        """See RowReader; with the places of masks."""
        return [self._store(row.text, index) for index, row in enumerate(rows)]

    def _store(self, text: str, index: int) -> StoredRow:
        pieces = encode_text(text, self._normalize).decode().split(self.mask)
        if len(pieces) < 2:
            raise RequestFault(422, f"row {index}: the text does not say {self.mask}, where a token is asked for")
        ids: list[int] = []
        masks: list[int] = []
        for number, piece in enumerate(pieces):
            if number:
                masks.append(len(ids))
                ids.append(self._mask_id)
            # To such a tokenizer the space before a word belongs to it, and so to what is hidden.
            is_before_mask = number < len(pieces) - 1 and self._joins_spaces
            piece = piece.removesuffix(" ") if is_before_mask else piece
            if piece:
                ids += self._encoder.encode(piece, add_special_tokens=False).ids
        if self._max_length is not None and len(ids) > self._max_length:
            raise RequestFault(
                422, f"row {index}: the text has {len(ids)} tokens and the model reads {self._max_length}; shorten it"
            )
        return {"input_ids": np.array(ids, dtype=np.int64), "masks": np.array(masks, dtype=np.int64)}

    def arrays(self, rows: list[StoredRow]) -> Arrays:
        """See RowReader; with ``attention_mask``, 0 at padding."""
        texts = [row["input_ids"] for row in rows]
        ids = padded(texts, 0)
        is_token = np.arange(ids.shape[1]) < np.array([len(text) for text in texts])[:, None]
        return {"input_ids": ids, "attention_mask": is_token.astype(np.int64)}

    def prediction(self, row: StoredRow, logits: np.ndarray, top_k: int) -> dict[str, Any]:
        """The likeliest tokens at each mask, and the text with the likeliest in place.

        Args:
            row: a text.
            logits: of its tokens, [length, vocabulary].
            top_k: candidates of each mask.
        """
        filled = row["input_ids"].copy()
        found = []
        for place in row["masks"]:
            probabilities = softmax(logits[place])[self.text_ids]
            best = np.argsort(-probabilities, kind="stable")[:top_k]
            filled[place] = self.text_ids[best[0]]
            found.append(
                [
                    {
                        "token": self.tokenizer.decode([int(self.text_ids[one])], skip_special_tokens=False),
                        "probability": float(probabilities[one]),
                    }
                    for one in best
                ]
            )
        return {"masks": found, "text": self.tokenizer.decode(filled.tolist(), skip_special_tokens=False)}
