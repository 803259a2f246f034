"""Tokenizers: those of Hugging Face, and one token per character for the toy tasks.

A response is decoded for people and graders, and its text is never encoded again.
"""

import json
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from oapl_jax.data.messages import Question, text_of, with_system
from oapl_jax.untrusted import reading, template

CHARS = "_$0123456789+-*=:,"
"""Alphabet of the toy tasks; the index of a character is its id. 0 is padding, 1 is the stop token."""

_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that no text has by the Unicode standard: one marks where a control token in a message is cut apart."""

CHARACTER_FILE = "character_tokenizer.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
TOKENIZER_FILE = "tokenizer_config.json"


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    vocab_size: int
    """V: ids below it may be sampled. Further rows of the embedding are padding."""
    stop_ids: tuple[int, ...]
    """All ids that end a response, ascending."""
    eos_id: int
    """The stop id that a demonstration ends with."""
    pad_id: int
    has_chat_template: bool
    """False: prompts are raw text."""

    def encode_prompt(self, question: Question, system: str | None = None) -> list[int]:
        """Token ids up to the beginning of the response; the messages' text does not become control tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "R"]) -> str:
        """Text of token ids, without special tokens."""
        ...

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that ``load(folder)`` needs."""
        ...


def load(
    source: str, folder: str | pathlib.Path | None = None, template_options: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer that ``model.tokenizer`` names.

    Args:
        source: ``characters``, ``model`` (the one in ``folder``), a folder, or a name on the Hugging Face hub.
        folder: the model's folder or hub name, which declares tokens that end a response too.
        template_options: ``model.chat_template_kwargs``.

    Raises:
        ValueError: there is no such tokenizer, or its chat template has no such option.
    """
    if source == "characters":
        return CharacterTokenizer()
    if source == "model":
        if folder is None:
            raise ValueError("model.tokenizer='model': there is no model folder that could have it; name a tokenizer")
        source = str(folder)
    saved = pathlib.Path(source) / CHARACTER_FILE
    if not saved.is_file():
        return HuggingFaceTokenizer(source, template_options, None if folder is None else str(folder))
    characters = reading.read_object(saved).get("characters")
    if characters != CHARS:  # the alphabet gives the ids their meaning
        raise ValueError(f"{saved}: its alphabet is {characters!r}, this program's is {CHARS!r}")
    return CharacterTokenizer()


def warn_of_control_tokens(tokenizer: Tokenizer, what: str, texts: Mapping[str, str]) -> None:
    """Says how many of the texts, by the names of their rows, spell out control tokens such as ``<|im_end|>``."""
    pattern = tokenizer.control if isinstance(tokenizer, HuggingFaceTokenizer) else re.compile("(?!)")
    found = {name: token[0] for name, text in texts.items() if (token := pattern.search(text))}
    for name, token in list(found.items())[:1]:
        warnings.warn(
            f"{len(found):,} of {len(texts):,} {what} spell out control tokens, such as {token!r} in row {name}. In"
            " messages of a chat they are read as ordinary text; in raw prompts and in responses they are control tokens",
            stacklevel=2,
        )


def _only_message(question: Question) -> str:
    if isinstance(question, str) or len(question) == 1:
        return text_of(question)
    raise ValueError(f"this tokenizer has no chat template, so it cannot write {len(question)} messages; give it text")


class CharacterTokenizer:
    """One token per character of ``CHARS``, for the toy tasks. Any other character, or a system message, is an error."""

    vocab_size = len(CHARS)
    pad_id, eos_id = CHARS.index("_"), CHARS.index("$")
    stop_ids = (eos_id,)
    has_chat_template = False

    def encode_prompt(self, question: Question, system: str | None = None) -> list[int]:
        """Token ids of the question alone."""
        if system is not None:
            raise ValueError(f"the character tokenizer has no system message; remove system={system!r}")
        return self.encode(_only_message(question))

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        for i, character in enumerate(text):
            if character not in CHARS:
                raise ValueError(f"character {character!r} at index {i} of {text!r} is not in {CHARS!r}")
        return [CHARS.index(character) for character in text]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "R"]) -> str:
        """Text without stop tokens. A sampled pad token becomes ``_``; hiding it would make wrong answers right."""
        return "".join(CHARS[int(i)] for i in ids if int(i) != self.eos_id)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes ``character_tokenizer.json``."""
        (pathlib.Path(folder) / CHARACTER_FILE).write_text(json.dumps({"characters": CHARS}) + "\n")


class HuggingFaceTokenizer:
    """A ``transformers`` tokenizer with its chat template and all stop ids: its own, and those that ``model`` declares."""

    def __init__(
        self, source: str, template_options: Mapping[str, Any] | None = None, model: str | None = None
    ) -> None:
        from transformers import AutoTokenizer  # the import takes 2.5 s, and the toy tasks do not need it

        try:
            files = {name: _read_json(source, name) for name in (TOKENIZER_FILE, MODEL_FILE, GENERATION_FILE)}
            for name, content in files.items():
                if code := content.get("auto_map") or content.get("trust_remote_code"):
                    raise ValueError(
                        f"{name} asks for code of its own ({code!r:.80}), which is never run; remove the key"
                    )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self._generation, declared = files[GENERATION_FILE], _eos_ids(files)
            if model not in (None, source):
                declared += _eos_ids({name: _read_json(model, name) for name in (MODEL_FILE, GENERATION_FILE)})
                self._generation = {**self._generation, "eos_token_id": declared} if self._generation else {}
        except BaseException as error:  # Rust's has no better base class
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"tokenizer {source!r}: cannot be loaded: {_first_line(error)}") from error
        templates = self._tokenizer.chat_template or {}
        for text in templates.values() if isinstance(templates, dict) else (templates,):
            template.check(str(text), f"tokenizer {source!r}")
        self.has_chat_template = bool(templates)
        # len() counts added tokens, unlike .vocab_size; neither counts the padding of the embedding.
        self.vocab_size = len(self._tokenizer)
        stops = [end for end in (self._tokenizer.eos_token_id, self._end_of_turn(), *declared) if end is not None]
        if not stops:
            raise ValueError(f"tokenizer {source!r}: nothing in its folder declares an eos token; give config.json one")
        self.eos_id, self.stop_ids = stops[0], tuple(sorted(set(stops)))
        pad = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else pad
        added = [(token.content, token.special) for token in self._tokenizer.added_tokens_decoder.values()]
        # DeepSeek does not mark its own as special.
        control = [text for text, is_special in added if is_special or re.fullmatch("<[|\uff5c].+[|\uff5c]>", text)]
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        """Control tokens in a text."""
        self._set_template_options(template_options or {}, source)

    def encode_prompt(self, question: Question, system: str | None = None) -> list[int]:
        """Token ids of the rendered chat up to the assistant's turn; without a chat template, those of the plain text.

        A control token in a message is written as the ordinary text that it is there: only the template may open and
        close turns. Plain text has no template, so it keeps its control tokens.

        Raises:
            ValueError: there is a system message or a conversation but no chat template, or the template fails.
        """
        if not self.has_chat_template:
            if system is not None:
                raise ValueError(f"this tokenizer has no chat template, so it cannot use system={system!r}; remove it")
            return self.encode(_only_message(question))
        messages = [*with_system(question, system)]
        contents = "".join(message["content"] for message in messages)
        cut = next(mark for mark in _CUTS if mark not in contents)
        for i, message in enumerate(messages):
            apart = self.control.sub(lambda token: f"{token[0][0]}{cut}{token[0][1:]}", message["content"])
            messages[i] = message | {"content": apart}
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program
            raise ValueError(f"the tokenizer's chat template fails: {_first_line(error)}; mend it") from error
        return [i for piece in text.split(cut) for i in self.encode(piece)]

    def encode(self, text: str) -> list[int]:
        """Token ids. The chat template writes its own special tokens, so none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "R"]) -> str:
        """Text of the ids, without special tokens and with spaces unchanged."""
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _set_template_options(self, options: Mapping[str, Any], source: str) -> None:
        """Makes the options defaults of the chat template itself, so that a saved tokenizer has them in every program."""
        for name, value in options.items():
            source_text = self._tokenizer.get_chat_template() if self._tokenizer.chat_template else ""
            if name in ("messages", "add_generation_prompt") or not re.search(rf"\b{re.escape(name)}\b", source_text):
                problem = f"the chat template of {source!r} has no such option; remove it"
                raise ValueError(f"model.chat_template_kwargs.{name}: {problem}")
            default = f"{{% set {name} = {name} if {name} is defined and {name} is not none else {value!r} %}}"
            self._tokenizer.chat_template = default + source_text.replace(default, "")

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the tokenizer and the generation config, which alone has the further stop ids."""
        self._tokenizer.save_pretrained(folder)
        if self._generation:
            (pathlib.Path(folder) / GENERATION_FILE).write_text(json.dumps(self._generation, indent=2) + "\n")

    def _end_of_turn(self) -> int | None:
        """The token that the chat template puts after an answer; None: there is none, or it is ordinary text."""
        if not self.has_chat_template:
            return None
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template is a program, and may be for questions only
            return None
        first = self.encode(text.rpartition("an answer")[2])[:1]
        return first[0] if first and first[0] in self._tokenizer.added_tokens_decoder else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


def _read_json(source: str, name: str) -> dict[str, Any]:
    """A JSON file of a model, or {} if it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else reading.read_object(pathlib.Path(path))


def _eos_ids(files: dict[str, dict[str, Any]]) -> list[int]:
    """The eos ids that a model declares, one number or several: in its generation_config.json, else in its config.json."""
    for name in (GENERATION_FILE, MODEL_FILE):
        declared = files[name].get("eos_token_id")
        declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
        if any(type(i) is not int or i < 0 for i in declared):
            raise ValueError(f"eos_token_id of the model is {declared!r:.80}, not token ids")
        if declared:
            return list(declared)
    return []
