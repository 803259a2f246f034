"""The pages say what is there: the log's columns, files and configs, the code and the messages that they quote."""

import importlib
import pathlib
import re
from typing import Annotated

import pyarrow as pa
import pytest

from oapl_jax.config.applies import AppliesWhen
from oapl_jax.config.section import Section
from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.rollouts import schema
from oapl_jax.rollouts.schema import COLUMNS
from test_layers import BOTTOM_FLOOR, MIDDLE_FLOORS, TOP_FLOOR

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts),
]


def test_the_columns_of_the_rollout_log_are_those_of_the_schema():
    page = (ROOT / "docs/rollout_log.md").read_text()
    table = page.split("## Columns")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([\w ]+)` \|.*\| (.+) \| (.+) \|$", table, re.MULTILINE)
    found = [
        (name, type_name_of(column.type), default_of(column), column.is_nullable) for name, column in COLUMNS.items()
    ]
    assert [(name, type_name, default, null != "never") for name, type_name, default, null in rows] == found
    assert f"Schema version {schema.SCHEMA_VERSION}." in table


def default_of(column):
    if column.is_required:
        return "refused"
    return "null" if column.default is None else f'`"{column.default}"`'


def type_name_of(arrow_type):
    return f"list of {arrow_type.value_type}" if pa.types.is_list(arrow_type) else str(arrow_type)


def test_the_floors_of_the_architecture_page_are_those_of_the_test():
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([`\w, ]+) \|", page, re.MULTILINE)
    floors = [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows]
    assert floors == [BOTTOM_FLOOR, *MIDDLE_FLOORS, TOP_FLOOR]
    assert [int(floor) for floor, _ in rows] == list(range(len(floors)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_a_page_with_its_options(name):
    index = (ROOT / "docs/objectives/README.md").read_text()
    (page,) = [
        link for names, link in re.findall(r"^\| \[(.+?)\]\((\w+\.md)\)", index, re.MULTILINE) if f"`{name}`" in names
    ]
    text = (ROOT / "docs/objectives" / page).read_text()
    parts = ["Metrics", "Details", "Departures", "Results"]
    assert re.findall(rf"^\*\*({'|'.join(parts)})\.\*\*", text, re.MULTILINE) == parts
    options = OBJECTIVES[name].options.model_fields
    assert [option for option in options if f"`objective.{option}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_points_to_exists(page):
    text = page.read_text()
    found = re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text)
    links = {link.partition("#")[0] for link in found if "://" not in link}
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [config for config in re.findall(r"\bconfigs/[\w.-]+\.yaml", text) if not (ROOT / config).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_modules_that_a_page_names_exist(page):
    text = page.read_text()
    modules = re.findall(r"python -m (oapl_jax\.[\w.]+)", text)
    files = re.findall(r"`((?:oapl_jax|tests|launch|benchmarks|docs|notebooks)/[\w/.]+\.\w+)`", text)
    paths = [*(module.replace(".", "/") + ".py" for module in modules), *files]
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.fixture(scope="module")
def reference():
    """What makes the tables of docs/configuration.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs/site"))
        return importlib.import_module("reference")


def test_the_configuration_reference_has_every_field(reference):
    tables = re.split(r"^### ", reference.markdown(), flags=re.MULTILINE)
    fields = {
        re.sub("`", "", table.partition("\n")[0]): re.findall(r"^\| `(\w+)`", table, re.MULTILINE) for table in tables
    }
    for config in reference.CONFIGS.values():
        assert config.model_fields.keys() <= set(fields[reference.TOP])
        for name, field in config.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.model_fields.keys() <= set(fields[name])
    assert {"beta1", "beta2"} <= set(fields["objective"])
    assert "task" in fields["data.sets.NAME"]
    assert "epochs" in fields["offline.rounds.NAME"]


def test_a_row_of_the_reference_says_type_default_meaning_and_condition(reference):
    rows = {
        row.split(" | ")[0]: row.split(" | ")[1:] for row in reference.markdown().splitlines() if row.startswith("| ")
    }
    kind, default, text, applies = rows["| `sync_every`"]
    assert (kind, default) == ("whole number from 1", "`50`")
    assert text == "Learner steps in a window (the paper's L)."
    assert applies == "`mode` is `online` or `detached` |"
    assert re.search(r"^\| `beta2` \| .* \| `0.001` \| .* \| `name` is `oapl`", reference.markdown(), re.MULTILINE)
    assert rows["| `gold`"][3].startswith("`functions` has `math`")
    assert rows["| `alpha`"][3].startswith("`rank` is set")


def test_a_condition_without_words_is_refused(reference):
    class Silent(Section):
        name: Annotated[str, AppliesWhen("other", condition=lambda other: other == 2)] = ""

    with pytest.raises(ValueError, match="docstring"):
        list(reference._conditions(Silent.model_fields["name"]))


def test_the_code_on_the_page_of_the_algorithm_is_that_of_the_program():
    page = (ROOT / "docs/algorithm.md").read_text()
    source = (ROOT / "oapl_jax/objectives/oapl.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    assert not [block for block in blocks if block not in source]


def test_the_messages_on_the_page_of_troubles_are_those_of_the_program():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "oapl_jax").rglob("*.py"))
    quoted = re.findall(r"^(?:\| )?`(?!oapl-jax)([^`/=]+ [^`/=]+)`", page, re.MULTILINE)
    assert len(quoted) > 15
    assert not [message for message in quoted if message not in source]


def test_every_page_opens_with_what_it_is_for():
    for page in PAGES:
        title, text = page.read_text().split("\n\n")[:2]
        assert title.startswith("# "), page
        assert re.match(r"\S", text), page
        assert not text.startswith(("#", "```", "- ", "|")), page
