"""The pages say what is there: the log's columns, the files that they link to, the configs that they name."""

import pathlib
import re

import pyarrow as pa
import pytest

from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.rollouts import schema
from oapl_jax.rollouts.schema import COLUMNS
from test_layers import BOTTOM_FLOOR, MIDDLE_FLOORS, TOP_FLOOR

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
