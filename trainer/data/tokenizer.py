"""Tokenizers: one of `transformers`, or a byte-level BPE trained on the corpus."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TRAINED = "train-bpe"
END_OF_TEXT = "<|endoftext|>"
PADDING, MASK = "[PAD]", "[MASK]"
PADDING_ID, MASK_ID = 1, 2
"""Ids of a trained tokenizer that masks, behind that of the end of text."""
HIDDEN = "\U0010ffff"
"""A noncharacter, which no text has, before the name of a token that is not to be made of characters."""
# A tokenizer of fewer tokens for text is none.
_MIN_TOKENS = 2


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, masks: bool = False, controls: Sequence[str] = ()
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE as GPT-2 uses it (Radford et al., 2019): any text can be encoded, none is unknown.

    Args:
        texts: training documents.
        vocab_size: largest number of tokens; a small corpus may give fewer.
        masks: whether there are also a token that hides others and one that fills up rows.
        controls: further control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *((PADDING, MASK) if masks else ()), *controls],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = {"pad_token": PADDING, "mask_token": MASK} if masks else {"pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, **roles)


def load_tokenizer(
    name: str, setting: str = "data.tokenizer", *, masks: bool = False, packs: bool = True
) -> "PreTrainedTokenizerFast":
    """Load a tokenizer by `transformers` name or folder.

    Args:
        name: the name or folder.
        setting: what names it, to speak of.
        masks: whether it must have a token that hides others; tokenizers that have one end a document by what
            separates two sentences where they know no end of text.
        packs: whether it must have a token that ends a document, which packed ones need.

    Raises:
        UserError: there is none, or it has no fast implementation, no token that ends a document, or no mask token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    remedy = f"name the folder of a tokenizer as data.tokenizer, or {TRAINED} for a model that begins from nothing"
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        # Not left to transformers, which would ask the hub for it, and without a network again and again.
        raise UserError(f"{setting}={name} cannot be loaded (there is no such folder); {remedy}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a missing or broken tokenizer
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{setting}={name} cannot be loaded ({reason}); {remedy}.") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{setting}={name} has no fast tokenizer; {remedy}.")
    if len(tokenizer.get_vocab().keys() - special_tokens(tokenizer)) < _MIN_TOKENS:
        # Of a model's folder without a tokenizer, transformers makes some kinds of tokenizer with nothing in them.
        raise UserError(f"{setting}={name} has no tokenizer, or one without tokens for text; {remedy}.")
    if masks and tokenizer.mask_token_id is None:
        raise UserError(
            f"{setting}={name} has no mask token, by which task.name=masked-lm hides what is to be predicted; name one "
            f"that has, such as bert-base-uncased, or {TRAINED}, which is given one."
        )
    if masks and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if packs and tokenizer.eos_token_id is None:
        raise UserError(f"{setting}={name} has no end-of-text token to put between documents; {remedy}.")
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a tokenizer.

    Raises:
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # The library's native code raises this, with the number in its text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Rows that a model's embedding needs: the largest id and one, where ids have gaps more than there are tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def text_encoder(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """What encodes documents: all that is in them is text, a control token's name too, and nothing is cut off.

    An end-of-text token inside a document would end it for the model.
    """
    return encoder_of(_description(tokenizer), special_tokens(tokenizer))


def encoder_of(description: dict[str, Any], special: set[str]) -> "Tokenizer":
    """See ``text_encoder``.

    Args:
        description: a tokenizer in its library's own form; changed.
        special: names of the tokens that stand for no text.
    """
    from tokenizers import Tokenizer

    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
    model = description["model"]
    # What stands for the unknown is the model's to give; a name of one character is text too.
    hidden = _hide(model, {name for name in special if len(name) > 1} - {model.get("unk_token")})
    # One that the model does not know any more would be given a new id, and push those behind it to others.
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in hidden]
    encoder = Tokenizer.from_str(json.dumps(description))
    encoder.encode_special_tokens = True
    return encoder


def stored_encoder(folder: Path) -> "tuple[Tokenizer, Tokenizer, dict[str, str]]":
    """A tokenizer as ``save_pretrained`` wrote it, without transformers.

    Args:
        folder: where it is.

    Returns:
        What encodes texts, see ``text_encoder``; the tokenizer as it is; and its control tokens by their role, such as
        ``mask_token``.

    Raises:
        OSError: a file is not there.
        ValueError: a file is none of a tokenizer.
    """
    from tokenizers import Tokenizer

    text = (folder / "tokenizer.json").read_text()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    roles = {name: _content(value) for name, value in settings.items() if name.endswith("_token") and value}
    several = ("additional_special_tokens", "extra_special_tokens")
    extra = [_content(token) for name in several for token in settings.get(name) or ()]
    description = plain_description(text)
    added = [token["content"] for token in description["added_tokens"] if token["special"]]
    controls = {role: name for role, name in roles.items() if isinstance(name, str)}
    special = {*controls.values(), *extra, *added}
    return encoder_of(description, special), Tokenizer.from_str(text), controls


def _content(token: Any) -> Any:
    """The name of a token, which may stand in a description of it."""
    return token.get("content") if isinstance(token, dict) else token


def control_encoder(tokenizer: "PreTrainedTokenizerFast", names: Iterable[str]) -> "Tokenizer":
    """What encodes texts in which control tokens are written with ``HIDDEN`` before their names; a name alone is text.

    Args:
        tokenizer: the tokenizer, which otherwise stays as it is.
        names: of the control tokens, each of more than one character.

    Raises:
        UserError: the tokenizer cannot tell a control token from its name.
    """
    from tokenizers import Tokenizer

    description = _description(tokenizer)
    control = set(names)
    _hide(description["model"], control)
    for token in description["added_tokens"]:
        if token["content"] in control:
            token["content"], token["normalized"] = HIDDEN + token["content"], False
    encoder = Tokenizer.from_str(json.dumps(description))
    for name in sorted(control):
        token_id = tokenizer.convert_tokens_to_ids(name)
        as_text = encoder.encode(name, add_special_tokens=False).ids
        if encoder.encode(HIDDEN + name, add_special_tokens=False).ids != [token_id] or token_id in as_text:
            raise UserError(
                f"data.tokenizer: its control token {name} cannot be told from a text that has this name in it; name "
                "another tokenizer for conversations."
            )
    return encoder


def first_difference(tokens: Mapping[str, int], reference: Mapping[str, int]) -> str | None:
    """The first token, by id, that has another id in the reference, or none, in words; None if there is none."""
    for token, token_id in sorted(tokens.items(), key=lambda item: item[1]):
        if reference.get(token) != token_id:
            other = f"instead of {reference[token]}" if token in reference else "and is not there"
            return f"{token!r} has id {token_id} {other}"
    return None


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    """Names of the tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _description(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    return plain_description(tokenizer.backend_tokenizer.to_str())


def plain_description(text: str) -> dict[str, Any]:
    """A tokenizer in its library's own form, without what it brings along for the inputs of some model."""
    description: dict[str, Any] = json.loads(text)
    description["truncation"] = description["padding"] = None
    return description


def _hide(model: dict[str, Any], names: set[str]) -> set[str]:
    """Rename tokens of a tokenizer's model to what no text has, so that it cannot put them together from characters.

    Returns:
        Those of the names that the model had.
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {(HIDDEN + name if name in names else name): i for name, i in vocabulary.items()}
        hidden = names & vocabulary.keys()
    else:
        # Of (token, score), the id being the place.
        unknown = model.get("unk_id")
        hidden = {name for i, (name, _) in enumerate(vocabulary) if name in names and i != unknown}
        model["vocab"] = [[HIDDEN + name if name in hidden else name, score] for name, score in vocabulary]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not hidden & {*pair, "".join(pair)}]
    return hidden


def tokenizer_identity(config: DataConfig) -> str:
    """What tells two tokenizers of one configuration apart: the contents of a local folder."""
    folder = Path(config.tokenizer).expanduser()
    masks = ":masks" if config.mask_token else ""
    if config.tokenizer == TRAINED or not folder.is_dir():
        return f"{config.tokenizer}:{config.vocab_size if config.tokenizer == TRAINED else ''}{masks}"
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest() + masks


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of a tokenizer's own serialised form."""
    return hashlib.sha256(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()), sort_keys=True).encode()
    ).hexdigest()


def use_worker_threads(num_workers: int) -> None:
    """Let `tokenizers` encode batches on this many threads; 0 means one per usable core.

    The library reads these variables when it starts its thread pool, which it does once.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(num_workers or len(os.sched_getaffinity(0)))
