"""A release: one version everywhere, a changelog that tells it, and workflows that can run."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import bridge

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The sections of Keep a Changelog.
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
SEMANTIC = r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?"


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    return loaded


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]


# The version


def test_the_version_comes_from_one_place() -> None:
    assert re.fullmatch(SEMANTIC, bridge.__version__)
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"] == {"path": "bridge/__init__.py"}
    assert metadata.version("wattbridge") == bridge.__version__


def test_the_program_says_its_version() -> None:
    program = Path(sys.executable).with_name("wattbridge")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == f"wattbridge {bridge.__version__}\n"


# The changelog


def test_the_changelog_keeps_its_format() -> None:
    sections = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    unreleased, *released = sections
    assert unreleased == "[Unreleased]"
    for section in released:
        assert re.fullmatch(rf"\[{SEMANTIC}\] - \d{{4}}-\d{{2}}-\d{{2}}", section), section
    assert len(set(sections)) == len(sections)
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= KINDS


def test_the_changelog_has_the_version_or_what_is_to_be_released() -> None:
    _, _, unreleased = CHANGELOG.partition("## [Unreleased]\n")
    assert f"## [{bridge.__version__}]" in CHANGELOG or "\n- " in unreleased.partition("\n## ")[0]


# The workflows


def test_the_workflows_are_valid() -> None:
    for schema, files in {
        "vendor.github-workflows": WORKFLOWS,
        "vendor.dependabot": [ROOT / ".github" / "dependabot.yml"],
    }.items():
        assert files
        reply = subprocess.run(
            [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert reply.returncode == 0, reply.stdout + reply.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_unless_a_job_says_why(path: Path) -> None:
    loaded = workflow(path.stem)
    assert loaded["permissions"] == {"contents": "read"}
    assert "concurrency" in loaded
    for job in loaded["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 60
        if path.stem != "release":
            assert "permissions" not in job
    for step in steps(path.stem):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_strangers_can_write_is_in_no_script(path: Path) -> None:
    """An expression in a script is pasted into it before it runs: values come by the environment."""
    for step in steps(path.stem):
        assert "${{" not in step.get("run", "")


def test_the_tests_run_with_every_python_that_is_promised() -> None:
    promised = [
        found[1]
        for classifier in PYPROJECT["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", classifier))
    ]
    assert workflow("test")["jobs"]["python"]["strategy"]["matrix"]["python"] == promised
    assert PYPROJECT["project"]["requires-python"] == f">={promised[0]}"


def test_the_tests_run_with_every_postgresql_that_is_promised() -> None:
    promised = re.search(r"PostgreSQL (\d+) to (\d+)", (ROOT / "docs/postgresql.md").read_text(encoding="utf-8"))
    assert promised
    oldest, newest = map(int, promised.groups())
    matrix = workflow("test")["jobs"]["postgresql"]["strategy"]["matrix"]["postgresql"]
    assert matrix == [str(version) for version in range(oldest, newest + 1)]


def test_the_workflows_call_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = {
        target
        for path in WORKFLOWS
        for step in steps(path.stem)
        for target in re.findall(r"\bmake ([a-z]+)", step.get("run", ""))
    }
    assert called
    assert called <= targets


# What release.yml does before anything else


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "bridge").mkdir()
    (tmp_path / "bridge/__init__.py").write_text('"""About."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n### Added\n- Later.\n\n## [1.2.3] - 2026-02-10\n\n### Fixed\n- A fault.\n"
        "- [A link](https://example.org).\n\n## [1.2.2] - 2026-02-09\n\n### Added\n- Earlier.\n\n[1.2.3]: https://example.org\n"
    )
    return tmp_path


def prepared(checkout: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """What the step of release.yml does with this tag."""
    (step,) = [step for step in steps("release") if step.get("id") == "notes"]
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        env={"PATH": os.environ["PATH"], "GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(checkout / "output")},
        cwd=checkout, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip


def test_the_notes_of_a_release_are_its_section_of_the_changelog(checkout: Path) -> None:
    reply = prepared(checkout, "v1.2.3")
    assert reply.returncode == 0, reply.stdout
    notes = (checkout / "notes.md").read_text()
    assert notes == "\n### Fixed\n- A fault.\n- [A link](https://example.org).\n\n"
    assert (checkout / "output").read_text() == "version=1.2.3\n"


def test_the_last_section_ends_before_the_links(checkout: Path) -> None:
    changelog = checkout / "CHANGELOG.md"
    changelog.write_text(re.sub(r"## \[1\.2\.2\].*- Earlier\.\n", "", changelog.read_text(), flags=re.DOTALL))
    assert prepared(checkout, "v1.2.3").returncode == 0
    assert "[1.2.3]:" not in (checkout / "notes.md").read_text()


@pytest.mark.parametrize("tag", ["v1.2.4", "1.2.3", "v1.2.3-rc1", "v1x2x3"])
def test_a_tag_that_is_not_the_version_is_no_release(checkout: Path, tag: str) -> None:
    reply = prepared(checkout, tag)
    assert reply.returncode == 1
    assert "bridge/__init__.py says 1.2.3" in reply.stdout


@pytest.mark.parametrize("section", ["## [1.2.3] - 2026-02-10\n\n## [1.2.2]", "## [1.2.30] - 2026-02-10\n- A.\n", ""])
def test_a_version_without_a_word_in_the_changelog_is_no_release(checkout: Path, section: str) -> None:
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n{section}")
    reply = prepared(checkout, "v1.2.3")
    assert reply.returncode == 1
    assert "CHANGELOG.md has no section" in reply.stdout
