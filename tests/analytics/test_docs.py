"""docs/analytics.md is true: its SQL runs against the schema for a reader, and the output shown has those columns."""

import re
from pathlib import Path

import psycopg
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "analytics.md"
EXAMPLE = re.compile(r"```sql\n(?P<sql>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
EXAMPLES = list(EXAMPLE.finditer(DOCUMENT.read_text(encoding="utf-8")))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10
    assert any(example["output"] for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: " ".join(example["sql"].split())[:60])
def test_the_sql_of_the_document_runs_and_its_output_is_of_this_query(example: re.Match[str], database: str) -> None:
    with psycopg.connect(database) as connection:
        # Settings are the owner's.
        if "analytics_setting" not in example["sql"]:
            connection.execute("SET ROLE wattbridge_reader")
        cursor = connection.execute(example["sql"].encode())
        if example["output"]:
            assert cursor.description
            header = example["output"].splitlines()[0]
            assert [column.strip() for column in header.split("|")] == [column.name for column in cursor.description]
