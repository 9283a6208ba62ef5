"""What a language model is asked: counted in tokens before it is passed on, and sampled as it was asked for."""

import json
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.data.chat_template import ChatTemplate
from trainer.data.tokenizer import load_tokenizer, special_tokens
from trainer.serving.language_forms import ChatForm, CompletionForm
from trainer.serving.options import RequestFault

_HEADS = ("ForCausalLM", "LMHeadModel")
_WEIGHTS = "model.safetensors"
_POSITIONS = ("max_position_embeddings", "n_positions")


class Prompts:
    """The tokenizer, the positions of the model, and how it generates."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Read a folder.

        Args:
            folder: the model, as ``from_pretrained`` loads it.
            max_tokens: the most tokens of an answer.

        Raises:
            UserError: it holds no whole language model.
        """
        self.folder = folder
        self.max_tokens = max_tokens
        settings = _read_json(folder, "config.json")
        head = (settings.get("architectures") or ["nothing that it names"])[0]
        if not head.endswith(_HEADS):
            raise UserError(
                f"{folder} holds a {head}, which does not continue text; export its run with --format onnx, or serve "
                "the run."
            )
        _refuse_missing_weights(folder)
        text_settings = settings.get("text_config") or settings
        found = (text_settings.get(name) for name in _POSITIONS)
        self.positions: int | None = next((value for value in found if isinstance(value, int)), None)
        self._tokenizer = load_tokenizer(str(folder), "the folder's tokenizer", packs=False)
        self.has_template = bool(self._tokenizer.chat_template)
        self._template = ChatTemplate(self._tokenizer, "the chat template") if self.has_template else None
        self._controls = sorted(name for name in special_tokens(self._tokenizer) if len(name) > 1)
        has_generation = (folder / "generation_config.json").exists()
        self._generation = _read_json(folder, "generation_config.json") if has_generation else {}

    def upstream(self, asked: ChatForm | CompletionForm) -> dict[str, Any]:
        """A request as ``transformers serve`` takes it.

        Raises:
            RequestFault: it asks for more than there are positions, or tokens allowed.
        """
        num_tokens = self._num_tokens(asked)
        left = self.max_tokens if self.positions is None else min(self.max_tokens, self.positions - num_tokens)
        if left < 1:
            raise RequestFault(
                422, f"the prompt has {num_tokens} tokens and the model {self.positions} positions; shorten it"
            )
        wanted = left if asked.asked_tokens is None else asked.asked_tokens
        if wanted > left:
            raise RequestFault(
                422,
                f"{wanted} tokens are asked for after a prompt of {num_tokens}; this server writes at most "
                f"{self.max_tokens}, and the model has {self.positions or 'any number of'} positions, so ask for at "
                f"most {left}",
            )
        # Without do_sample a temperature would be left out in silence.
        sampling: dict[str, Any] = {"do_sample": False}
        if asked.temperature > 0:
            sampling = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
        generation = {**self._generation, **sampling, "max_new_tokens": wanted}
        # By its name of now, none of which its class would take.
        generation.pop("transformers_version", None)
        body = {"model": str(self.folder), "stream": asked.stream, "generation_config": json.dumps(generation)}
        body |= {} if asked.seed is None else {"seed": asked.seed}
        return body | asked.upstream() | {"max_tokens": wanted}

    def _num_tokens(self, asked: ChatForm | CompletionForm) -> int:
        if isinstance(asked, CompletionForm):
            num_tokens = len(self._tokenizer(asked.prompt)["input_ids"])
            if not num_tokens:
                raise RequestFault(422, "the prompt has no token; give a text to continue")
            return num_tokens
        assert self._template is not None, "the caller has seen that there is one"
        for message in asked.messages:
            # What renders the conversation below would make tokens of them, and so turns of what somebody said.
            named = next((name for name in self._controls if name in message.content), None)
            if named is not None:
                raise RequestFault(422, f"a message says {named}, which is a control token of the model; leave it out")
        try:
            return len(self._template.prompt_ids([message.model_dump() for message in asked.messages]))
        except UserError as error:
            raise RequestFault(422, str(error)) from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); export the run once more.") from None
    return settings


def _refuse_missing_weights(folder: Path) -> None:
    index = folder / f"{_WEIGHTS}.index.json"
    names = {_WEIGHTS}
    if index.exists():
        names = set(_read_json(folder, index.name).get("weight_map", {}).values())
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise UserError(f"{folder} has no {missing[0]}, which holds weights of its model; export the run once more.")
