"""Prompts as lists of chat messages: a system message, several turns."""

from typing import Any

from oapl_jax.data.rows import plain_cell, string_cell

Messages = list[dict[str, Any]]
"""Each has a ``role`` and a ``content``, which is text; what else a chat template reads is kept."""
Question = str | Messages
"""What is asked: the text of one user message, or a whole conversation."""


def question_cell(cell: Any, column: str, row_name: str) -> Question:
    """The cell of a prompt.

    Raises:
        ValueError: it is neither text nor a list of messages that ends before the assistant's turn; names the row.
    """
    cell = plain_cell(cell)
    if isinstance(cell, dict) and all(isinstance(entries, list) for entries in cell.values()):  # of columns
        cell = [dict(zip(cell, entries, strict=True)) for entries in zip(*cell.values(), strict=True)]
    if not isinstance(cell, list):
        return string_cell(cell, column, row_name)
    where = f"row {row_name}: column {column!r}"
    messages = [_message(entry, f"{where}, message {i}", column, row_name) for i, entry in enumerate(cell)]
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        last = f"ends with a message of the {messages[-1]['role']}" if messages else "has no messages"
        raise ValueError(f"{where} {last}; a prompt ends with what the model is to answer")
    return messages


def _message(entry: Any, where: str, column: str, row_name: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str) or "content" not in entry:
        raise ValueError(f"{where} is {entry!r:.80}, not an object with role and content")
    content = entry["content"]
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{where} has parts that are no text, which this program cannot give to a model")
        content = "".join(part["text"] for part in content)
    content = string_cell(content, column, row_name)
    return {key: value for key, value in entry.items() if value is not None} | {"content": content}


def fill(template: str, question: Question) -> Question:
    """The question with the template around it, of a conversation around its last message of the user."""
    # str.format would fail on the LaTeX braces of templates and questions
    if isinstance(question, str):
        return template.replace("{prompt}", question)
    last = max((i for i, message in enumerate(question) if message["role"] == "user"), default=-1)
    return [
        message | {"content": template.replace("{prompt}", message["content"])} if i == last else message
        for i, message in enumerate(question)
    ]


def with_system(question: Question, system: str | None) -> Messages:
    """The question as messages, with a system message before them.

    Raises:
        ValueError: they have one already.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if system is not None and any(message["role"] == "system" for message in messages):
        raise ValueError(f"it has a system message of its own; remove data.system={system!r:.80}")
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def text_of(messages: Question) -> str:
    """The question for people and graders: a lone message is its content, a conversation has the role before each."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
