"""``configs/gsm8k_qwen2.5.yaml`` end to end: real vocabulary, tokenizer, chat template and questions, a tiny model."""

import contextlib
import io
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from oapl_jax.cli import commands
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes
from oapl_jax.model import hf, qwen
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.run import export
from oapl_jax.types import FinishReason, Verdict
from runs import ROOT, finish, read_lines, signal_after, start

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs/gsm8k_qwen2.5.yaml"
NUM_IDS, NUM_ROWS = 151_665, 151_936
IM_END, END_OF_TEXT = 151_645, 151_643
GOLD = "5"
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def shared(shared_data):
    return shared_data


@pytest.fixture(scope="module")
def model_folder(shared, tmp_path_factory):
    """A Qwen2.5 of two random layers that likes a few tokens: a response often ends, and now and then is right."""
    folder = tmp_path_factory.mktemp("model") / "tiny-qwen2.5"
    shutil.copytree(shared / "tokenizer/qwen2.5-0.5b-instruct", folder)
    values = json.loads((folder / "config.json").read_text()) | SHAPE
    (folder / "config.json").write_text(json.dumps(values))
    assert values["vocab_size"] == NUM_ROWS
    assert values["tie_word_embeddings"]
    save_file(random_weights(values), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(values):
    rng = np.random.default_rng(0)
    D, F, K = SHAPE["hidden_size"], SHAPE["intermediate_size"], values["num_key_value_heads"] * 8

    def normal(*shape, std):
        return rng.normal(0, std, shape).astype(np.float32)

    # Every layer's values have a bias along one direction of the residual stream; so do the liked tokens.
    direction = np.ones(D, np.float32) / np.sqrt(D)
    embedding = normal(NUM_ROWS, D, std=0.1)
    liked = {IM_END: 2.4, END_OF_TEXT: 2.1, **dict.fromkeys(range(15, 25), 2.1), 15 + int(GOLD): 2.4}
    for token, strength in liked.items():
        embedding[token] += strength * direction
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": 1 + normal(D, std=0.1)}
    for i in range(SHAPE["num_hidden_layers"]):
        output = normal(D, D, std=0.1)
        bias = normal(K, std=0.1)
        heads = np.concatenate([bias.reshape(-1, 8)] * 2, axis=1).reshape(-1)  # as grouped queries see the values
        output += np.outer(4 * direction - output @ heads, heads) / (heads @ heads)
        weights |= {
            f"model.layers.{i}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": 1 + normal(D, std=0.1),
                "post_attention_layernorm.weight": 1 + normal(D, std=0.1),
                "self_attn.q_proj.weight": normal(D, D, std=0.1),
                "self_attn.q_proj.bias": normal(D, std=0.1),
                "self_attn.k_proj.weight": normal(K, D, std=0.1),
                "self_attn.k_proj.bias": normal(K, std=0.1),
                "self_attn.v_proj.weight": normal(K, D, std=0.1),
                "self_attn.v_proj.bias": bias,
                "self_attn.o_proj.weight": output,
                "mlp.gate_proj.weight": normal(F, D, std=0.1),
                "mlp.up_proj.weight": normal(F, D, std=0.1),
                "mlp.down_proj.weight": normal(D, F, std=0.1),
            }.items()
        }
    return weights


@pytest.fixture(scope="module")
def questions(shared, tmp_path_factory):
    """Short questions of GSM8K with one and the same gold answer, in files as a user would have them."""
    folder = tmp_path_factory.mktemp("data") / "gsm8k"
    folder.mkdir()
    for split, num in (("train", 12), ("test", 2)):
        lines = (shared / f"math/gsm8k/{split}.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(f'#### {GOLD}"}}\n') and len(line) < 500]
        (folder / f"{split}.jsonl").write_text("".join(kept[:num]))
    return folder


def overrides(run_dir, model_folder, questions):
    """A run of this file that is small and exact: three steps of eight rollouts, float32."""
    return [
        *("run.steps=3", f"run.dir={run_dir}", f"model.path={model_folder}", "mesh.trainer=fsdp=1"),
        *("data.format=jsonl", "data.name=null", f"data.path={questions}/train.jsonl", "data.max_prompt_tokens=176"),
        *(f"evaluation.path={questions}/test.jsonl", "evaluation.every=0", "evaluation.final_samples=4"),
        *("sampler.group_size=4", "sampler.max_response_tokens=16", "sampler.groups_in_flight=2"),
        *("sampler.decode_steps=8", "learner.batch_rollouts=8", "learner.micro_batch_rows=4"),
        *("window.sync_every=2", "checkpoint.every=1", "reward.workers=1", "reward.timeout=60"),
        *("model.compute_dtype=float32", "sampler.dtype=float32", "window.parity_tolerance=1e-4"),
        *("learner.learning_rate=1e-3", "learner.clip_norm=1.0", "logging.progress=false", "run.tracker=null"),
    ]


@pytest.fixture(scope="module")
def finished(model_folder, questions, tmp_path_factory):
    """Three learner steps, interrupted by SIGTERM after the first and resumed in this process."""
    directory = tmp_path_factory.mktemp("gsm8k") / "run"
    words = overrides(directory, model_folder, questions)
    process = start(CONFIG, *words)
    was_running = signal_after(process, directory, 1, signal.SIGTERM)
    code, output = finish(process)
    assert was_running, output
    assert code == 42, output
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert commands.main(["train", "--config", str(CONFIG), *words]) == 0
    assert "resumed at step" in printed.getvalue()
    return directory


@pytest.fixture(scope="module")
def groups(finished):
    log = RolloutLog(finished / "rollouts")
    return {group.id: group for version in log.versions() for group in log.read(version)}


@pytest.fixture(scope="module")
def transformers_tokenizer(model_folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model_folder)


def test_three_steps_one_sync_and_a_resume(finished):
    batches = read_lines(finished / "batches.jsonl")
    assert [(row["step"], row["policy_version"]) for row in batches] == [(1, 0), (2, 0), (3, 1)]
    rows = read_lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["learner/grad_norm"] > 0 for row in rows[1:])
    assert [("sync/seconds" in row) for row in rows] == [False, False, True, False]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["rollouts"] == 24
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [2, 3]


def test_the_math_grader_gave_the_rewards(groups):
    """Checked for responses that are nothing but digits: right exactly where the number is the gold one."""
    rollouts = [item for group in groups.values() for item in group.rollouts]
    assert {Verdict.CORRECT, Verdict.WRONG} == {item.grade.verdict for item in rollouts}
    numbers = [item for item in rollouts if item.text.isdigit() and item.rollout.finish_reason == FinishReason.STOP]
    assert len({item.grade.verdict for item in numbers}) == 2
    for item in numbers:
        assert item.grade.reward == float(int(item.text) == int(GOLD)), item.text
    for item in rollouts:
        if item.rollout.finish_reason == FinishReason.LENGTH:
            assert item.grade.reward == 0


def test_the_log_has_the_tokens_of_the_text(groups, transformers_tokenizer):
    for group in groups.values():
        for item in group.rollouts:
            ids = item.rollout.token_ids
            assert item.text == transformers_tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            assert ids.max() < NUM_IDS
            stops = np.isin(ids, [IM_END, END_OF_TEXT])
            assert not stops[:-1].any()
            assert stops[-1] == (item.rollout.finish_reason == FinishReason.STOP)
    last = {int(i.rollout.token_ids[-1]) for group in groups.values() for i in group.rollouts}
    assert {IM_END, END_OF_TEXT} <= last, "both end a response"


def test_prompts_are_what_the_chat_template_writes(groups, questions, transformers_tokenizer):
    asked = [row["question"] for row in read_lines(questions / "train.jsonl")]
    for group in groups.values():
        number = int(group.prompt.id.removeprefix("gsm8k/train/"))
        content = f"{asked[number]}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        assert group.prompt.text == content
        expected = transformers_tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert transformers_tokenizer.decode(group.prompt.token_ids.tolist()) == expected
        assert expected.endswith("<|im_start|>assistant\n")


def test_logged_logprobs_match_a_rescoring(groups, model_folder):
    """Version 0 sampled with the weights of the folder."""
    mesh, _ = make_meshes(MeshConfig(trainer="fsdp=1"))
    config, params = hf.load_params(model_folder, mesh, TRAINER_RULES, "float32")
    graphdef = qwen.abstract(config)[0]
    score = jax.jit(
        lambda params, tokens, mask: sequence_logprobs(
            graphdef, params, tokens, mask, temperature=1.0, vocab_size=NUM_IDS
        )[0]
    )
    first = [group for group in groups.values() if group.policy_version == 0]
    assert len(first) >= 4
    length = max(len(group.prompt.token_ids) for group in first) + 16
    for group in first:
        tokens = np.zeros((len(group.rollouts), length), np.int32)
        mask, logged = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
        for b, item in enumerate(group.rollouts):
            begin = len(group.prompt.token_ids)
            end = begin + len(item.rollout.token_ids)
            tokens[b, :begin], tokens[b, begin:end] = group.prompt.token_ids, item.rollout.token_ids
            mask[b, begin:end], logged[b, begin:end] = True, item.rollout.logprobs
        np.testing.assert_allclose(score(params, tokens, mask), logged, atol=1e-4, rtol=0)
        assert logged[mask].max() < 0


def test_transformers_reloads_the_export(finished, model_folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export = finished / "export"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.eos_token_id == [IM_END, END_OF_TEXT]
    mesh, _ = make_meshes(MeshConfig(trainer="fsdp=1"))
    config, params = hf.load_params(export, mesh, TRAINER_RULES, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == NUM_IDS
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], tokenize=False)
    ids = np.asarray([tokenizer.encode(prompt, add_special_tokens=False)])
    model = nnx.merge(qwen.abstract(config)[0], params)
    hidden, _ = model.hidden(jnp.asarray(ids, jnp.int32), jnp.arange(ids.shape[1])[None])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-4, rtol=0)
    _, before = hf.load_params(model_folder, mesh, TRAINER_RULES, "float32")
    assert not np.array_equal(before.embedding[...], params.embedding[...]), "it was trained"


def test_the_newest_checkpoint_exports_to_the_same_folder(finished, tmp_path):
    export.export(finished, tmp_path / "out")
    files = {path.name for path in (finished / "export").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes(), name


def test_a_dry_run_counts_the_prompts_over_the_limit(
    shared, model_folder, questions, tmp_path, transformers_tokenizer, capsys
):
    limit = 100
    path = shared / "math/gsm8k/train.jsonl"
    template = config_file.load(TrainConfig, CONFIG).data.template
    rows = read_lines(path)
    bare = len(transformers_tokenizer.encode(rendered(transformers_tokenizer, "", template)))
    texts = [rendered(transformers_tokenizer, row["question"], template) for row in rows]
    overlong = sum(len(ids) > limit for ids in transformers_tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert bare < limit
    assert 0 < overlong < len(rows)
    words = [*overrides(tmp_path / "run", model_folder, questions), f"data.path={path}"]
    dry = [*words, f"data.max_prompt_tokens={limit}", "--dry-run"]
    assert commands.main(["train", "--config", str(CONFIG), *dry]) == 0
    output = capsys.readouterr().out
    assert f"{len(rows) - overlong:,} ({overlong:,} overlong or without an answer dropped)" in output
    assert f"{NUM_IDS:,} of {NUM_ROWS:,} vocabulary rows in use" in output
    assert not (tmp_path / "run").exists()


def rendered(tokenizer, question, template):
    message = {"role": "user", "content": template.replace("{prompt}", question)}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


GOOD = {"question": "What is 2 + 3?", "answer": "It is\n#### 5"}
BAD_DATA = {
    "empty": ([], [], "has no rows"),
    "overlong": ([GOOD, GOOD | {"question": "a " * 300}], ["data.overlong=error"], "row gsm8k/train/1: its prompt has"),
    "gold-absent": ([GOOD, GOOD | {"answer": "It is 5"}], [], "gsm8k/train/1: the answer has no '####'"),
    "gold-no-number": ([GOOD, GOOD, GOOD | {"answer": "#### \\frac{"}], [], "gsm8k/train/2"),
    "column": ([{"query": "What is 2 + 3?", "answer": "#### 5"}], [], "has no column 'question'; it has query, answer"),
    "model-absent": ([GOOD], ["model.path=./no-such-model"], "no-such-model"),
}


@pytest.mark.parametrize(("rows", "words", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_inputs_end_with_a_message_and_exit_code_2(model_folder, tmp_path, capsys, rows, words, message):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, content in (("train", rows), ("test", [GOOD])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    command = ["train", "--config", str(CONFIG), *overrides(tmp_path / "run", model_folder, folder), *words]
    assert commands.main(command) == 2
    assert message in capsys.readouterr().err
