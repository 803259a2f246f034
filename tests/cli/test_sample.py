"""``oapl-jax sample`` before it samples: options that cannot be read are named, and a wait is said."""

import pytest

from oapl_jax.cli import commands, sample


@pytest.mark.parametrize(
    ("word", "told"), [("enforce_eager", "write it as KEY=VALUE"), ("sizes=[1", "its value cannot be read")]
)
def test_an_option_that_cannot_be_read_is_named(word, told, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--run", "none", "--engine", "vllm", "--wait", "0", word])
    assert ended.value.code == 2
    assert f"{word!r}: {told}" in capsys.readouterr().err


def test_a_sampler_that_waits_says_what_for(tmp_path, capsys):
    assert commands.main(["sample", "--run", str(tmp_path), "--wait", "0"]) == 1
    shown = capsys.readouterr()
    assert f"waiting for a published policy in {tmp_path}, of a trainer with mode=detached" in shown.out
    assert "waited 0 s" in shown.err
