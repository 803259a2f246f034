"""What a person who got a config wrong is told, and that a saved config is the same config."""

import pathlib
import subprocess
import sys
import typing

import pytest

from oapl_jax.build.checks import CHECKS, objective_of
from oapl_jax.config import config_file
from oapl_jax.config.applies import AppliesWhen
from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, SftConfig, TrainConfig
from oapl_jax.config.config_file import ConfigError
from oapl_jax.config.section import Section

TOY = """
run: {dir: runs/x, steps: 10}
model: {config: model.json, tokenizer: characters}
data: {task: chain, max_prompt_tokens: 12}
sampler: {group_size: 4, max_response_tokens: 6}
learner: {batch_rollouts: 16}
"""
DATASET = TOY.replace("task: chain", "path: train.jsonl")
SFT = """
run: {dir: runs/x, steps: 10}
model: {config: model.json, tokenizer: characters}
data: {task: chain}
"""


@pytest.fixture
def load(tmp_path):
    """Loads YAML text with overrides."""

    def load_text(text=TOY, *overrides, schema=TrainConfig):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return config_file.load(schema, path, list(overrides), CHECKS)

    return load_text


def mistakes(load, *args, **options):
    """The lines of the error, without the head."""
    with pytest.raises(ConfigError) as caught:
        load(*args, **options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("window.epochs=3", "window.epochs=3 does not divide window.sync_every=50"),
        ("window.min_groups=201", "window.min_groups=201 is more than the window's 200 new groups"),
        ("window.order=random", "window.order"),
        ("window.max_version_lag=2", "window.max_version_lag"),
        ("window={max_version_lag: 1, max_uses: 2}", "max_version_lag=1 and max_uses=2: set one of them"),
        ("window={max_version_lag: 1, epochs: 2}", "max_version_lag=1 and epochs=2: set one of them"),
        ("window={max_version_lag: 1, imports: x}", "max_version_lag=1 and imports=x: set one of them"),
    ],
)
def test_windows_that_cannot_be_are_refused(load, override, message):
    assert message in only_mistake(load, TOY, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.clip_norm=.inf", "learner.clip_norm: Input should be a finite number"),
        ("sampler.stop_strings=x", "sampler.stop_strings: should be a list such as [a, b] (value 'x')"),
        ("window=3", "window: should be a section with keys of its own (value 3)"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_words_of_yaml(load, override, message):
    assert message in only_mistake(load, TOY, override)


def test_groups_of_the_version_before_are_for_a_process_that_samples(load):
    assert load(TOY, "window.max_version_lag=1").window.max_version_lag == 1
    (line,) = mistakes(load, TOY, "window.max_version_lag=1", "mode=detached")
    assert line == "window.max_version_lag: has no effect with mode=detached; remove it"


@pytest.mark.parametrize(("text", "schema"), [(TOY, TrainConfig), (SFT, SftConfig)])
def test_bfloat16_weights_are_refused_where_they_are_trained(load, text, schema):
    """Of SmolLM2-135M's weights 0.23 % change at all in a step of 1e-6 that is rounded to bfloat16."""
    message = only_mistake(load, text, "model.param_dtype=bfloat16", schema=schema)
    assert "model.param_dtype=bfloat16" in message
    assert "model.compute_dtype=bfloat16" in message
    load(text, "model.param_dtype=bfloat16", "lora.rank=4", schema=schema)


def only_mistake(load, *args, **options):
    (line,) = mistakes(load, *args, **options)
    return line


def test_all_mistakes_are_reported_at_once_with_path_value_range_and_nearest_name(load):
    with pytest.raises(ConfigError) as caught:
        load(
            TOY,
            "learner.lerning_rate=1e-4",
            "learner.adam_b1=1.5",
            "run.steps=soon",
            "objective.name=oalp",
            "sampler.beta1=2",
            "windows.sync_every=3",
        )
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("6 mistakes in ")
    assert head.endswith("run.yaml")
    message = {line.split(":")[0].strip(): line for line in lines}
    assert "did you mean 'learner.learning_rate'?" in message["learner.lerning_rate"]
    assert "less than 1" in message["learner.adam_b1"]
    assert "1.5" in message["learner.adam_b1"]
    assert "integer" in message["run.steps"]
    assert "'soon'" in message["run.steps"]
    assert "did you mean 'oapl'?" in message["objective.name"]
    assert "'oalp'" in message["objective.name"]
    assert "did you mean 'objective.beta1'?" in message["sampler.beta1"]
    assert "did you mean 'window'?" in message["windows"]


def test_mistakes_between_sections_are_reported_at_once_and_counted(load):
    with pytest.raises(ConfigError, match=r"^3 mistakes in") as caught:
        load(
            TOY,
            "learner.batch_rollouts=18",
            "window.max_groups_ahead=2",
            "evaluation.path=x.jsonl",
        )
    message = str(caught.value)
    for key in (
        "learner.batch_rollouts=18",
        "window.max_groups_ahead=2",
        "evaluation.path",
    ):
        assert key in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampler.top_kk=3", "did you mean 'sampler.top_k'?"),
        ("data.group_size=1", "did you mean 'sampler.group_size'?"),
        ("checkpoint.zzz=1", "known here: every, keep"),
        ("zzz=1", "known here: mode, run, model, data"),
    ],
)
def test_an_unknown_key_names_the_nearest_here_else_the_same_elsewhere_else_all(load, override, expected):
    line = only_mistake(load, TOY, override)
    assert line.startswith(f"{override.partition('=')[0]}: unknown key")
    assert expected in line


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[3,2]", "profile.steps: [3, 2] ends before it begins"),
        ("[2,11]", "profile.steps: step 11 is after the last one, run.steps=10"),
        ("[0,2]", "profile.steps.0: "),
        ("[2]", "profile.steps.1: "),
    ],
)
def test_the_steps_of_a_trace_are_steps_of_the_run(load, steps, message):
    assert only_mistake(load, TOY, f"profile.steps={steps}").startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.batch_rollouts=16.5", "learner.batch_rollouts"),
        ("logging.progress=maybe", "logging.progress"),
        ("run.dir=5", "run.dir"),
        ("run=3", "run"),
        ("learner.learning_rate=[1]", "learner.learning_rate"),
        ("window.deadline=-1", "window.deadline"),
        ("sampler.top_p=0", "sampler.top_p"),
        ("mesh.trainer=fdsp=4", "mesh.trainer"),
        ("mesh.trainer=fsdp=0", "mesh.trainer"),
    ],
)
def test_a_wrong_type_or_range_names_key_and_value(load, override, message):
    line = only_mistake(load, TOY, override)
    assert line.startswith(f"{message}: ")
    assert f"(value {override.removeprefix(message + '=').strip('[]')}" in line.replace("'", "").replace("[", "")


def test_a_missing_key_is_named(load):
    assert only_mistake(load, TOY.replace(", steps: 10", "")) == "run.steps: is required and missing"


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(TOY)
    with pytest.raises(ConfigError, match=r"quikstart\.yaml' does not exist; did you mean '.*quickstart\.yaml'\?"):
        config_file.load(TrainConfig, tmp_path / "quikstart.yaml")


def test_every_malformed_override_is_named(load):
    with pytest.raises(ConfigError) as caught:
        load(TOY, "run.steps", "=3", "run..steps=3", "run.steps=[1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for word, line in zip(["run.steps", "=3", "run..steps=3", "run.steps=[1"], lines, strict=True):
        assert line.startswith(f"override {word!r}: ")


@pytest.mark.parametrize("text", ["run: [1", "run: {dir: x\nmodel", "a: b: c", "run: ${nothing}"])
def test_malformed_yaml_names_the_file(load, text):
    with pytest.raises(ConfigError, match=r"run\.yaml' cannot be read"):
        load(text)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "word"])
def test_yaml_that_is_no_table_of_sections_is_an_error(load, text):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(text)


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "0.000001"])
def test_scientific_notation_is_a_number_in_yaml_and_on_the_command_line(load, number):
    in_file = TOY.replace("batch_rollouts: 16", f"batch_rollouts: 16, learning_rate: {number}")
    assert load(in_file).learner.learning_rate == 1e-6
    assert load(TOY, f"learner.learning_rate={number}").learner.learning_rate == 1e-6


def test_a_mesh_is_its_words_although_they_hold_an_equals_sign(load):
    assert load(TOY, "mesh.trainer=data=2,fsdp=-1").mesh.trainer == "data=2,fsdp=-1"


@pytest.mark.parametrize(
    ("text", "override", "named"),
    [
        (TOY, "data.answer_column=gold", "answer_column"),
        (TOY, "evaluation.path=test.jsonl", "evaluation.path"),
        (TOY, "evaluation.split=validation", "evaluation.split"),
        (TOY, "reward.timeout=9", "reward.timeout"),
        (DATASET, "data.name=main", "name"),
        (DATASET, "data.split=test", "split"),
        (DATASET, "evaluation.split=validation", "evaluation.split"),
    ],
)
def test_an_option_without_effect_is_refused(load, text, override, named):
    line = only_mistake(load, text, override)
    assert named in line
    assert "has no effect" in line


def test_options_of_the_other_objective_are_refused(load):
    line = only_mistake(load, TOY, "objective.name=grpo", "objective.beta2=0.1")
    assert line == "objective.beta2: has no effect with name=grpo; remove it"
    assert load(TOY, "objective.name=grpo").objective.name == "grpo"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=opal"], "objective.name: unknown name 'opal'; did you mean 'oapl'?"),
        (["objective.beta3=1"], "objective.beta3: unknown key (value 1); did you mean 'objective.beta"),
        (["objective.drop_equal_groups=1"], "did you mean 'objective.drop_equal_reward_groups'?"),
        (["objective.beta2=soon"], "objective.beta2: Input should be a valid number"),
        (["objective.name=gspo", "objective.clip_low=0"], "objective.clip_low: Input should be greater than 0"),
        (["data.task=chian"], "data.task: unknown name 'chian'; did you mean 'chain'?"),
        (["data.task=null", "data.dataset=math50"], "data.dataset: unknown name 'math50'; did you mean 'math500'?"),
        (
            ["data.task=null", "data.dataset=mbpp"],
            "data.dataset=mbpp is graded by code; set reward.functions={code: 1.0}",
        ),
    ],
)
def test_names_and_options_of_dicts_are_checked(load, overrides, message):
    assert message in only_mistake(load, TOY, *overrides)


def test_mistakes_of_dicts_are_reported_with_all_others(load):
    overrides = [
        "objective.name=gspo",
        "objective.beta2=3",
        "objective.clip_low=soon",
        "learner.adam_b1=2",
        "run.dir=5",
    ]
    keys = {line.split(":")[0] for line in mistakes(load, TOY, *overrides, "data.task=chian")}
    assert keys == {"objective.beta2", "objective.clip_low", "learner.adam_b1", "run.dir", "data.task"}


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], {"beta1": 1.0, "beta2": 1e-3}),
        (["objective.beta2=1"], {"beta1": 1.0, "beta2": 1.0}),
        (["objective.name=gspo"], {"clip_low": 3e-4, "clip_high": 4e-4}),
        (["objective.name=rloo"], {}),
    ],
)
def test_the_config_is_completed_by_the_options_of_its_objective(load, tmp_path, overrides, options):
    config = load(TOY, *overrides)
    assert config.objective.model_extra == options
    assert objective_of(config.objective)[1].model_dump() == options
    (tmp_path / "saved.yaml").write_text(config_file.to_yaml(config))
    assert config_file.load(TrainConfig, tmp_path / "saved.yaml") == config


def test_a_config_that_spells_out_all_defaults_loads_whatever_has_no_effect(load):
    config = load(TOY, "objective.clip_low=0.0003", "objective.clip_high=0.0004", "lora.alpha=32", "reward.timeout=5")
    assert config == load(TOY)


def test_several_fields_without_effect_are_a_line_each(load):
    lines = mistakes(load, TOY, "reward.timeout=9", "reward.workers=3", "run.shared_dir=x", "window.epochs=3")
    assert "reward.timeout: has no effect with data.task=chain; remove it" in lines
    assert "reward.workers: has no effect with data.task=chain; remove it" in lines
    assert "run.shared_dir: has no effect with mode=online; remove it" in lines
    assert len(lines) == 4


def test_every_condition_of_a_field_names_a_field():
    """Of its own section, or of the whole config of a command that has the section."""
    found = 0
    for root in (TrainConfig, GenerateConfig, SftConfig, EvaluateConfig):
        for owner, condition in conditions(root, root):
            for key in condition.keys:
                schema = owner if key.partition(".")[0] in owner.model_fields else root
                for part in key.split("."):
                    assert part in schema.model_fields, f"{owner.__name__}: {key} is no field"
                    schema = section_of(schema.model_fields[part].annotation)
                found += 1
    assert found > 50


def conditions(root, schema):
    """Each ``AppliesWhen`` below a section, with the section of its field."""
    for field in schema.model_fields.values():
        yield from ((schema, item) for item in field.metadata if isinstance(item, AppliesWhen))
        if (inner := section_of(field.annotation)) is not None:
            yield from conditions(root, inner)


def section_of(annotation):
    """The section in an annotation such as ``Section | None`` or ``tuple[Section, ...]``."""
    options = [annotation, *typing.get_args(annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def test_options_without_effect_on_supervised_tasks_are_refused(load):
    line = only_mistake(load, SFT, "data.response_column=answer", schema=SftConfig)
    assert "response_column: has no effect" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=x.jsonl"], "give exactly one of task, dataset and path"),
        (["data.task=null"], "give exactly one of task, dataset and path"),
        (["model.path=x"], "got path, config"),
        (["model.config=null"], "got none"),
        (["model.tokenizer=model"], "a model built from a bare config has none"),
    ],
)
def test_sources_that_exclude_each_other(load, overrides, message):
    assert message in only_mistake(load, TOY, *overrides)


def test_a_group_of_one_is_refused(load):
    line = only_mistake(load, TOY, "sampler.group_size=1")
    assert line.startswith("sampler.group_size: ")
    assert "greater than or equal to 2 (value 1)" in line


@pytest.mark.parametrize(
    ("batch", "group", "nearest"), [(128, 3, 129), (128, 12, 132), (125, 12, 120), (4, 16, 16), (100, 8, 96)]
)
def test_a_batch_that_groups_do_not_fill_names_the_nearest_that_they_do(load, batch, group, nearest):
    line = only_mistake(load, TOY, f"learner.batch_rollouts={batch}", f"sampler.group_size={group}")
    assert f"learner.batch_rollouts={batch} is not a multiple of sampler.group_size={group}" in line
    assert line.endswith(f"nearest: {nearest}")
    assert abs(nearest - batch) == min(abs(k * group - batch) for k in range(1, batch))


@pytest.mark.parametrize(
    ("text", "overrides", "schema"),
    [
        (TOY, [], TrainConfig),
        (TOY, ["objective.name=grpo", "learner.learning_rate=1e-6", "run.dir='a: b'"], TrainConfig),
        (DATASET, ["data.template='Say: {prompt}\\n'", "window.max_groups_ahead=4"], TrainConfig),
        (DATASET, ["data.format=datasets", "data.name=main", "data.split=train", "mesh.sampler=tensor=2"], TrainConfig),
        (SFT, [], SftConfig),
    ],
)
def test_a_saved_config_loads_to_an_equal_one(load, tmp_path, text, overrides, schema):
    config = load(text, *overrides, schema=schema)
    (tmp_path / "saved.yaml").write_text(config_file.to_yaml(config))
    assert config_file.load(schema, tmp_path / "saved.yaml") == config


def test_configs_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().run.steps = 3


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_commands_print_mistakes_and_exit_with_2_without_a_traceback(tmp_path, command):
    (tmp_path / "run.yaml").write_text(SFT if command == "sft" else TOY)
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "oapl_jax",
            command,
            "--config",
            str(tmp_path / "run.yaml"),
            "learner.lerning_rate=3",
            "run.steps=0",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(
        f"error: {2 if command == 'sft' else 3} mistakes in "
    )  # train looks for the model too
    assert "did you mean 'learner.learning_rate'?" in done.stderr
    assert "run.steps" in done.stderr
