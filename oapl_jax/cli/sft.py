"""``oapl-jax sft --config C.yaml``: supervised fine-tuning."""

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig
from oapl_jax.distributed.compile_cache import use_compile_cache
from oapl_jax.io.terminal import say
from oapl_jax.sft.sft import run


def main(argv: list[str]) -> None:
    """Exit codes: 0 done, 2 the config is wrong."""
    config, arguments = config_file.from_command_line(SftConfig, "sft", argv, checks=CHECKS)
    if arguments.dry_run:
        say(config_file.to_yaml(config))
        return
    use_compile_cache(config.run.compile_cache)
    say(f"model written to {run(config)}")
