"""The wheel alone, in an empty environment far from the checkout, is a working Wattbridge."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel as built from the checkout, and by way of the source distribution."""
    built = {}
    # Without --wheel, build makes the source distribution first and the wheel from that.
    for way, options in {"checkout": ["--wheel"], "sdist": []}.items():
        target = tmp_path_factory.mktemp(way)
        run([sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", target, CHECKOUT])
        (built[way],) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of an installation that has the wheel and, by a path file, our dependencies."""
    place = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", place / "venv"])
    python = place / "venv" / "bin" / "python"
    target = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheels["checkout"]])
    # Path files of the other directory are not followed, so the checkout stays out of sight.
    (Path(target) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "venv" / "bin" / "wattbridge"


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    reply = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd, timeout=100
    )
    assert reply.returncode == 0, reply.stdout
    return reply.stdout


@pytest.mark.parametrize("way", ["checkout", "sdist"])
def test_every_sql_file_is_in_the_wheel(wheels: dict[str, Path], way: str) -> None:
    expected = {f"bridge/sql/{path.relative_to(CHECKOUT / 'sql')}" for path in (CHECKOUT / "sql").rglob("*.sql")}
    with zipfile.ZipFile(wheels[way]) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith(".sql")}
        assert all(wheel.read(name) for name in packed), "a link instead of a file"
    assert packed == expected


@pytest.mark.parametrize("way", ["checkout", "sdist"])
def test_every_template_and_every_file_of_the_pages_is_in_the_wheel(wheels: dict[str, Path], way: str) -> None:
    web = CHECKOUT / "bridge" / "web"
    files = [path for folder in ("templates", "static") for path in (web / folder).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(CHECKOUT)) for path in files}
    assert len([name for name in expected if name.endswith("LICENSE")]) == 2
    with zipfile.ZipFile(wheels[way]) as wheel:
        assert expected <= set(wheel.namelist())


def test_the_checkout_is_not_what_runs(program: Path, tmp_path: Path) -> None:
    where = run([program.with_name("python"), "-c", "import bridge, simulator; print(bridge.__file__)"], cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(program.parents[1])


def test_help(program: Path, tmp_path: Path) -> None:
    assert "migrate" in run([program, "--help"], cwd=tmp_path)


def test_migrate_from_a_foreign_directory(
    program: Path, postgres_dsn_admin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "wattbridge_wheel"
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(postgres_dsn_admin, autocommit=True) as admin:
        admin.execute(drop)
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            dsn = make_conninfo(postgres_dsn_admin, dbname=name)
            monkeypatch.setenv("WATTBRIDGE_DATABASE__DSN", dsn)
            run([program, "migrate"], cwd=tmp_path)
            with psycopg.connect(dsn) as connection:
                found = connection.execute("SELECT to_regclass('meter_history') IS NOT NULL").fetchone()
            assert found == (True,)
        finally:
            admin.execute(drop)
