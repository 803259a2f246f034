"""A program: one of the processes of a replica that spans processes. Run by test_processes.py."""

import contextlib
import json
import sys

import jax


def main(address: str, number: str, total: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(total), int(number), initialization_timeout=60)

    from oapl_jax.distributed.sharding import SAMPLER_RULES, shardings
    from oapl_jax.model import qwen
    from oapl_jax.rollouts.sampling import Request
    from oapl_jax.sampler.scheduler import Scheduler
    from test_engine import CONFIG, PARAMS, PROMPTS, make_engine, run

    engine = make_engine(sampler_mesh=f"tensor={total}")
    targets = shardings(qwen.abstract(CONFIG)[1], engine.mesh, SAMPLER_RULES)
    params = jax.tree.map(
        lambda leaf, to: jax.make_array_from_callback(leaf.shape, to, lambda i: leaf[i]), PARAMS, targets
    )
    scheduler = Scheduler(engine, contextlib.nullcontext())
    done = run(scheduler, [Request(i, p, 4, (7, 0, i)) for i, p in enumerate(PROMPTS)], params)
    print(json.dumps([[r.token_ids.tolist() for r in done[i]] for i in sorted(done)]), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
