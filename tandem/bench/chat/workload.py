"""The chat load as it is committed in `benchmarks/workloads`, and as token ids of one model.

Owns the file's form and how a conversation becomes prompts; sends nothing. A turn's prompt is the tokens of the whole
history, the system's own answers as the ids it drew, so that every prefix is one it has computed: nothing is tokenized anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tandem.errors import ConfigError, InvalidRequest
from tandem.tokenizer.chat_template import Message
from tandem.tokenizer.tokenizer import Tokenizer

WORKLOAD = Path(__file__).resolve().parents[3] / "benchmarks" / "workloads" / "chat.json"
_MAX_BYTES = 64 * 2**20
_ANSWER = "The answer stands here."
"""In place of an answer while the template is rendered."""

Seconds = Annotated[float, Meta(ge=0, le=3600)]
Text = Annotated[str, Meta(min_length=1, max_length=1_000_000)]


class UserTurn(Struct, frozen=True, forbid_unknown_fields=True):
    """What the user says, so long after the answer before it."""

    text: Text
    think_s: Seconds


class Conversation(Struct, frozen=True, forbid_unknown_fields=True):
    """`arrival` is in units of a process of one conversation a unit; `system` counts the workload's system prompts."""

    arrival: Annotated[float, Meta(ge=0, le=1e6)]
    system: Annotated[int, Meta(ge=0)]
    turns: Annotated[tuple[UserTurn, ...], Meta(min_length=1, max_length=100)]


class Workload(Struct, frozen=True, forbid_unknown_fields=True):
    """The file, see `benchmarks/workloads/README.md`."""

    answer_tokens: Annotated[int, Meta(ge=2, le=4096)]
    systems: Annotated[tuple[Text, ...], Meta(min_length=1)]
    conversations: Annotated[tuple[Conversation, ...], Meta(min_length=1)]

    @property
    def mean_turns(self) -> float:
        """Turns of a conversation."""
        return sum(len(conversation.turns) for conversation in self.conversations) / len(self.conversations)

    def max_rate(self, seconds: float) -> float:
        """The most turns a second for which there are arrivals enough for `seconds`."""
        return self.conversations[-1].arrival * self.mean_turns / seconds


def load_workload(path: Path) -> Workload:
    """Reads a workload. Raises ConfigError naming the file and what is wrong."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, the limit of a workload is {_MAX_BYTES}")
        workload = msgspec.json.decode(path.read_bytes(), type=Workload)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is not there: the workload is part of Tandem's source, run this in a checkout"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no workload: {error}") from error
    arrivals = [conversation.arrival for conversation in workload.conversations]
    if arrivals != sorted(arrivals) or not arrivals[-1]:
        raise ConfigError(f"{path} is no workload: its conversations must be in the order of their arrivals")
    unknown = max(conversation.system for conversation in workload.conversations)
    if unknown >= len(workload.systems):
        raise ConfigError(
            f"{path} is no workload: a conversation has system prompt {unknown} of {len(workload.systems)}"
        )
    return workload


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation in token ids. `parts[n]` is what comes before the n-th answer and after the one before it."""

    arrival: float
    parts: tuple[tuple[int, ...], ...]
    think_s: tuple[float, ...]


class Scripts:
    """The workload in one model's tokens. Raises ConfigError for a model without a chat template."""

    def __init__(self, workload: Workload, tokenizer: Tokenizer) -> None:
        if not tokenizer.has_chat_template:
            raise ConfigError("the model has no chat template, and the workload is a chat")
        self._workload = workload
        self._tokenizer = tokenizer
        self._later: dict[int, tuple[tuple[int, ...], ...]] = {}

    def salted(self, salt: int) -> list[Script]:
        """Every conversation, the system prompts with that number before them: no block of one salt is one of another."""
        scripts = []
        for index, conversation in enumerate(self._workload.conversations):
            first, *later = self._rendered(self._system(salt, conversation), conversation)
            if index not in self._later:
                self._later[index] = tuple(map(self._encoded, later))
            parts = (self._encoded(first), *self._later[index])
            scripts.append(Script(conversation.arrival, parts, tuple(turn.think_s for turn in conversation.turns)))
        return scripts

    def _system(self, salt: int, conversation: Conversation) -> str:
        # Of a fixed length, so that every salt makes the same number of tokens.
        return f"{salt:06d} {self._workload.systems[conversation.system]}"

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def _rendered(self, system: str, conversation: Conversation) -> Sequence[str]:
        """The text of all turns, cut where the answers stand."""
        messages = [Message("system", system)]
        for turn in conversation.turns:
            messages += [Message("user", turn.text), Message("assistant", _ANSWER)]
        try:
            parts = self._tokenizer.render_chat(messages[:-1]).split(_ANSWER)
        except InvalidRequest as error:
            raise ConfigError(f"the workload doesn't suit the model: {error}") from error
        if len(parts) != len(conversation.turns):
            raise ConfigError("the workload doesn't suit the model: its chat template changes what an assistant said")
        return parts
