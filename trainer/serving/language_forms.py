"""Requests to a language model: the part of OpenAI's API that is answered as it says, and nothing beside it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_MAX_SEED = 2**63 - 1
_MAX_CHARACTERS = 1_000_000


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=_MAX_CHARACTERS)]


class SamplingForm(BaseModel):
    """What both kinds of requests have; fields that would not be obeyed are refused by name."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int | None, Field(ge=0, le=_MAX_SEED)] = None
    stream: bool = False
    n: Literal[1] = 1

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens that are asked for; None where nothing is said of it."""
        return self.max_tokens


class CompletionForm(SamplingForm):
    """A text to continue."""

    prompt: Annotated[str, Field(max_length=_MAX_CHARACTERS)]

    def upstream(self) -> dict[str, Any]:
        """What is passed on beside how to sample."""
        return {"prompt": self.prompt}


class ChatForm(SamplingForm):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    @property
    def asked_tokens(self) -> int | None:
        """See SamplingForm; the newer of two names comes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def upstream(self) -> dict[str, Any]:
        """See CompletionForm."""
        return {"messages": [message.model_dump() for message in self.messages]}
