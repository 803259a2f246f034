"""Qwen's real tokenizers against known ids, and the character tokenizer of the toy tasks."""

import pytest

from oapl_jax.data import tokenizer

QWEN25 = "qwen2.5-0.5b-instruct"
QWEN3 = "qwen3-8b"
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module", params=[(QWEN25, 151_665), (QWEN3, 151_669)], ids=[QWEN25, QWEN3])
def qwen(request, shared_data):
    name, num_ids = request.param
    return tokenizer.load(str(shared_data / "tokenizer" / name)), num_ids


def test_qwen_knows_every_token_and_stop_id(qwen):
    loaded, num_ids = qwen
    assert loaded.vocab_size == num_ids
    assert loaded.stop_ids == (151_643, 151_645)
    assert (loaded.eos_id, loaded.pad_id) == (151_645, 151_643)
    assert loaded.encode("<|im_start|>") == [151_644]


def test_qwen_ids_are_those_of_llama_cpp(qwen, shared_data):
    loaded, _ = qwen
    folder = shared_data / "tokenizer" / "llamacpp"
    # bytes: read_text would turn the cases' carriage returns into newlines
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    assert len(lines) == 46
    for text, line in zip(texts, lines, strict=False):
        ids = [int(word) for word in line.split()]
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == text


def test_chat_template_is_written_once_and_ends_at_the_assistants_turn(shared_data):
    loaded = tokenizer.load("model", shared_data / "tokenizer" / QWEN25)
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    expected = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nhi {{x}}<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.encode_prompt("hi {x}") == loaded.encode(expected.format(system))
    assert loaded.encode_prompt("hi {x}", "Be brief.") == loaded.encode(expected.format("Be brief."))
    assert loaded.encode_prompt("hi {x}").count(151_644) == 3
    assert loaded.decode([*loaded.encode("a  b ."), 151_645]) == "a  b ."


def test_saved_tokenizer_reloads_with_its_stop_ids(qwen, tmp_path):
    loaded, num_ids = qwen
    loaded.save(tmp_path)
    again = tokenizer.load("model", tmp_path)
    assert (again.vocab_size, again.stop_ids, again.pad_id) == (num_ids, loaded.stop_ids, loaded.pad_id)
    assert again.encode_prompt("1+1=?") == loaded.encode_prompt("1+1=?")


def test_without_a_chat_template_the_prompt_is_plain_text(shared_data, tmp_path):
    loaded = tokenizer.load(str(shared_data / "tokenizer" / QWEN25))
    loaded._tokenizer.chat_template = None
    loaded.save(tmp_path)
    plain = tokenizer.load(str(tmp_path))
    assert plain.encode_prompt("1+1=") == plain.encode("1+1=")
    with pytest.raises(ValueError, match="has no chat template"):
        plain.encode_prompt("1+1=", "Be brief.")


def test_characters(tmp_path):
    characters = tokenizer.load("characters")
    assert characters.encode_prompt("7+5=") == [9, 12, 7, 15]
    assert characters.decode([4, 0, 8, 1]) == "2_6"
    assert (characters.vocab_size, characters.stop_ids, characters.pad_id) == (18, (1,), 0)
    characters.save(tmp_path)
    assert isinstance(tokenizer.load("model", tmp_path), tokenizer.CharacterTokenizer)
    with pytest.raises(ValueError, match=r"character 'x' at index 2 of '7\+x'"):
        characters.encode("7+x")
    with pytest.raises(ValueError, match="no system message"):
        characters.encode_prompt("7", "Be brief.")


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}': cannot be loaded"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(ValueError, match="no model folder"):
        tokenizer.load("model")
