"""Which tokens end a response, by the files of a model folder; and folders that bring code."""

import json

import pytest

from oapl_jax.data import tokenizer
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops


def turns(end):
    """A chat template whose turns end so."""
    body = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" + end
    return {"tokenizer_config": {"chat_template": "{% for m in messages %}" + body + "{% endfor %}"}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer of single bytes with three special tokens, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<|im_start|>", "<|im_end|>"])  # ids 256, 257, 258
    folder = tmp_path_factory.mktemp("plain")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
    return folder


def copy(plain, folder, **files):
    for source in plain.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    for name, content in files.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **content}))
    return str(folder)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (256,)),
        ({"config": {"eos_token_id": 258}}, (256, 258)),
        ({"config": {"eos_token_id": [10, 258]}, "generation_config": {"temperature": 0.6}}, (10, 256, 258)),
        ({"config": {"eos_token_id": 258}, "generation_config": {"eos_token_id": [256, 257]}}, (256, 257)),
        (turns("<|im_end|>\n"), (256, 258)),
        (turns("\n\n"), (256,)),
        (turns(""), (256,)),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 257}}, (257,)),
    ],
    ids=str,
)
def test_a_response_ends_at_the_tokens_that_the_model_declares(plain, tmp_path, files, expected):
    loaded = tokenizer.load(copy(plain, tmp_path, **files))
    assert loaded.stop_ids == expected
    assert loaded.eos_id in expected
    assert loaded.has_chat_template == ("chat_template" in files.get("tokenizer_config", {}))


@pytest.mark.parametrize("own", [{}, {"generation_config": {"eos_token_id": 256, "temperature": 0.6}}], ids=str)
def test_a_tokenizer_of_another_folder_ends_where_the_model_says_too(plain, tmp_path, own):
    model, folder, saved = (tmp_path / name for name in ("model", "tokenizer", "saved"))
    for path in (model, folder, saved):
        path.mkdir()
    (model / "config.json").write_text('{"eos_token_id": 257}')
    source = copy(plain, folder, **own)
    assert tokenizer.load(source, model).stop_ids == (256, 257)
    (model / "generation_config.json").write_text('{"eos_token_id": [258]}')
    loaded = tokenizer.load(source, model)
    assert (loaded.eos_id, loaded.stop_ids) == (256, (256, 258))
    loaded.save(saved)
    if own:  # else the model's own file is written beside it
        assert tokenizer.load(str(saved)).stop_ids == (256, 258)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}},
        {"tokenizer_config": {"trust_remote_code": True}},
        {"config": {"auto_map": {"AutoConfig": "code.Mine"}}},
    ],
    ids=str,
)
def test_a_folder_with_code_is_refused_without_a_question(plain, tmp_path, monkeypatch, files):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = copy(plain, tmp_path, **files)
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"config\.json asks for code of its own.*never run"):
        tokenizer.load(folder)


def test_an_eos_that_is_no_id_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match="eos_token_id"):
        tokenizer.load(copy(plain, tmp_path, config={"eos_token_id": "<eos>"}))


def test_a_special_token_that_is_given_as_a_string_stops(plain, tmp_path):
    loaded = tokenizer.load(copy(plain, tmp_path))
    stops = Stops(loaded, SamplingDistribution(stop_strings=("<|im_end|>", "\n")))
    assert stops.ids == (256, 258)
    assert str(stops) == (
        r"end at token 256, 258 or '<|im_end|>' or '\n'; prompts are raw text: the tokenizer has no chat template"
    )
    assert stops.text([*loaded.encode("64"), 258]) == "64"
    assert stops.text(loaded.encode("64 \n65")) == "64 "
