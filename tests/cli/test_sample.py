"""``oapl-jax sample``: options of an engine that cannot be read are named before anything starts."""

import pytest

from oapl_jax.cli import sample


@pytest.mark.parametrize(
    ("word", "told"), [("enforce_eager", "write it as KEY=VALUE"), ("sizes=[1", "its value cannot be read")]
)
def test_an_option_that_cannot_be_read_is_named(word, told, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--run", "none", "--engine", "vllm", "--wait", "0", word])
    assert ended.value.code == 2
    assert f"{word!r}: {told}" in capsys.readouterr().err
