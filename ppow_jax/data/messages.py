"""Conversations: messages of a system, a user and an assistant, in turn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant". reasoning: the assistant's reasoning before its answer."""

    role: str
    content: str
    reasoning: str | None = None


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant messages in turn, the first by the user.

    Without recorded answers (`turns`) the user messages follow one another. `source` is "file:line",
    "file[index]" or "dataset[index]".
    """

    messages: tuple[Message, ...]
    source: str

    @property
    def user_turns(self) -> tuple[str, ...]:
        """Contents of the user's messages, in order."""
        return tuple(m.content for m in self.messages if m.role == "user")

    @property
    def system(self) -> str | None:
        """The system message, if the conversation begins with one."""
        return self.messages[0].content if self.messages[0].role == "system" else None
