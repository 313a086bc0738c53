"""Who may do what, all of it, by the catalog; and what a hostile login can do with the functions of the owner."""

import psycopg
import pytest

from bridge.migrate import migrate
from tests.integration.harness import ask, one

# All that the roles are given on tables and views.
TABLES = """
writer  analytics_setting        SELECT
writer  charger_assignment       SELECT INSERT UPDATE DELETE
writer  dead_letter              SELECT INSERT DELETE
writer  device_duplicate         SELECT INSERT UPDATE
writer  device_presence          SELECT INSERT UPDATE
writer  ingest_counter           SELECT INSERT UPDATE
writer  meter_history            SELECT INSERT
writer  meter_live               SELECT INSERT UPDATE
writer  rollup_mark              SELECT INSERT
writer  rollup_progress          SELECT
writer  schema_migration         SELECT
writer  vehicle_history          SELECT INSERT
writer  vehicle_live             SELECT INSERT UPDATE
writer  vehicle_reading          SELECT
reader  charger_performance_24h  SELECT
reader  charging_session         SELECT
reader  closed_24h               SELECT
reader  data_quality             SELECT
reader  dead_letter_list         SELECT
reader  dead_letter_summary      SELECT
reader  device_silent            SELECT
reader  fleet_inefficient        SELECT
reader  fleet_now                SELECT
reader  fleet_summary_24h        SELECT
reader  ingest_status            SELECT
reader  meter_reading            SELECT
reader  meter_status             SELECT
reader  vehicle_performance_24h  SELECT
reader  vehicle_reading          SELECT
reader  vehicle_status           SELECT
"""
# All functions that they may execute.
FUNCTIONS = """
writer  ensure_history_partitions
writer  rollup_advance
writer  rollup_refresh
writer  rollup_restart
retention drop_history_before
reader  charger_performance
reader  charger_sessions
reader  charger_vehicles
reader  charging_sessions
reader  device_quality
reader  efficiency_reason
reader  energy_by_day
reader  energy_by_hour
reader  energy_by_quarter_hour
reader  finding
reader  fleet_chargers
reader  fleet_charging
reader  fleet_faults
reader  fleet_performance
reader  fleet_summary
reader  kwh_left
reader  meter_quarters
reader  meter_totals
reader  vehicle_efficiency_by_hour
reader  vehicle_performance
reader  vehicle_quarters
reader  vehicle_totals
"""
# And beside them: what PUBLIC has in any database.
REST = {"USAGE on schema public", "CONNECT on database", "TEMPORARY on database"}

# What the login that asks has on tables and views, also by PUBLIC or on single columns.
PRIVILEGES_OF_TABLES = """
WITH known AS (
    SELECT * FROM unnest(
        ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']
        || CASE WHEN current_setting('server_version_num')::int < 170000 THEN '{}' ELSE '{MAINTAIN}'::text[] END
    ) WITH ORDINALITY AS list (privilege, place)
)
SELECT relname, string_agg(privilege, ' ' ORDER BY place)
FROM pg_class CROSS JOIN known
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')
    AND (has_table_privilege(pg_class.oid, privilege) OR (privilege IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
         AND has_any_column_privilege(pg_class.oid, privilege)))
GROUP BY relname
"""
EXECUTABLE = """
SELECT proname FROM pg_proc
WHERE pronamespace = 'public'::regnamespace AND has_function_privilege(oid, 'EXECUTE') ORDER BY proname
"""
PRIVILEGES_ON_THE_REST = """
SELECT privilege || ' on schema ' || nspname
FROM pg_namespace CROSS JOIN unnest(ARRAY['USAGE', 'CREATE']) AS privilege
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' AND has_schema_privilege(pg_namespace.oid, privilege)
UNION ALL
SELECT privilege || ' on database'
FROM unnest(ARRAY['CONNECT', 'CREATE', 'TEMPORARY']) AS privilege
WHERE has_database_privilege(current_database(), privilege)
UNION ALL
SELECT 'something on sequence ' || relname
FROM pg_class
WHERE relnamespace = 'public'::regnamespace
    AND CASE WHEN relkind = 'S' THEN has_sequence_privilege(oid, 'USAGE, SELECT, UPDATE') END
"""


# --- what they may do --------------------------------------------------------------------------------------


def given(text: str, role: str) -> dict[str, str]:
    """The lines of a role, by object."""
    lines = (line.split() for line in text.strip().splitlines())
    return {name: " ".join(rest) for who, name, *rest in lines if who == role}


@pytest.mark.parametrize("role", ["writer", "retention", "reader", "stranger"])
def test_each_role_may_do_what_is_written_above_and_nothing_else(
    database: str, logins: dict[str, str], role: str
) -> None:
    ask(database, "SELECT ensure_history_partitions('meter_history', ARRAY['2026-11-20'::date])")
    ask(database, "SELECT ensure_rollup_partitions('2026-11-20', '2026-11-21')")
    assert dict(ask(logins[role], PRIVILEGES_OF_TABLES)) == given(TABLES, role)
    assert [name for (name,) in ask(logins[role], EXECUTABLE)] == list(given(FUNCTIONS, role))
    assert {what for (what,) in ask(logins[role], PRIVILEGES_ON_THE_REST)} == REST


def test_the_roles_are_groups_without_any_power_of_their_own(database: str) -> None:
    roles = "('wattbridge_writer', 'wattbridge_retention', 'wattbridge_reader')"
    powers = "rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls"
    assert ask(database, f"SELECT {powers} FROM pg_roles WHERE rolname IN {roles}") == [(False,) * 6] * 3
    assert one(database, f"SELECT count(*) FROM pg_auth_members WHERE member::regrole::text IN {roles}") == 0
    assert one(database, "SELECT count(*) FROM pg_default_acl") == 0


def test_the_reader_sees_a_payload_in_the_list_of_dead_letters_alone(database: str, logins: dict[str, str]) -> None:
    ask(
        database,
        "INSERT INTO dead_letter (device_id, digest, topic, payload, content_type, reason, detail, received_at) "
        "VALUES ('MTR-1', 'x', 'a/topic', 'S3CRET', 'S3CRET', 'malformed', 'not JSON', now())",
    )
    summary = ask(logins["reader"], "SELECT letters, example_topic, example_detail FROM dead_letter_summary")
    assert summary == [(1, "a/topic", "not JSON")]
    assert one(logins["reader"], "SELECT payload FROM dead_letter_list") == b"S3CRET"
    for view in given(TABLES, "reader").keys() - {"dead_letter_list"}:
        shown = one(logins["reader"], f"SELECT coalesce(string_agg(line::text, ' '), '') FROM {view} AS line")
        assert "S3CRET" not in shown
        assert b"S3CRET".hex() not in shown


# --- what the hostile may try ------------------------------------------------------------------------------

# Temporary objects with the names of ours, and a search path that prefers them.
DECOYS = """
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v') LOOP
        EXECUTE format('CREATE TEMP TABLE %I (decoy int)', name);
    END LOOP;
    FOR name IN SELECT format('%I(%s)', proname, oidvectortypes(proargtypes)) FROM pg_proc
                WHERE pronamespace = 'public'::regnamespace LOOP
        EXECUTE format('CREATE FUNCTION pg_temp.%s RETURNS int LANGUAGE plpgsql AS ''BEGIN RAISE ''''fooled''''; END''', name);
    END LOOP;
END
$$;
SET search_path = pg_temp, public
"""  # noqa: E501 - SQL
HOUR = "2026-11-20 10:00Z"
# An hour of a vehicle at a meter: a part of it is in the rollups, a part is not.
FILL = f"""
INSERT INTO meter_history
SELECT 'MTR-1', ts, 0.5, 230, ts, false
FROM generate_series('{HOUR}'::timestamptz, '{HOUR}'::timestamptz + '59 minutes', '1 minute') AS ts;
INSERT INTO vehicle_history
SELECT 'VEH-1', ts, 0.4, 50, 30, 'MTR-1', ts, false
FROM generate_series('{HOUR}'::timestamptz, '{HOUR}'::timestamptz + '59 minutes', '1 minute') AS ts;
INSERT INTO meter_live SELECT meter_id, ts, kwh_ac, voltage, received_at FROM meter_history ORDER BY ts DESC LIMIT 1;
INSERT INTO vehicle_live
SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at FROM vehicle_history ORDER BY ts DESC LIMIT 1;
SELECT rollup_advance('{HOUR}'::timestamptz + '30 minutes');
SELECT rollup_refresh()
"""
QUESTIONS = [
    *(f"public.{view}" for view in given(TABLES, "reader")),
    f"public.charger_performance('MTR-1', '{HOUR}')",
    f"public.charger_sessions('MTR-1', '{HOUR}')",
    f"public.charger_vehicles('MTR-1', '{HOUR}')",
    f"public.charging_sessions('VEH-1', '{HOUR}')",
    "public.device_quality('MTR-1')",
    f"public.energy_by_day('{HOUR}')",
    f"public.energy_by_hour('{HOUR}')",
    f"public.energy_by_quarter_hour('{HOUR}', vehicle => 'VEH-1')",
    f"public.fleet_chargers('{HOUR}')",
    f"public.fleet_charging('{HOUR}', 'infinity')",
    f"public.fleet_faults('{HOUR}')",
    f"public.fleet_performance('{HOUR}')",
    f"public.meter_quarters('MTR-1', '{HOUR}')",
    f"public.meter_totals('{HOUR}', 'infinity')",
    f"public.vehicle_efficiency_by_hour('VEH-1', '{HOUR}')",
    f"public.vehicle_performance('VEH-1', '{HOUR}')",
    f"public.vehicle_quarters('VEH-1', '{HOUR}')",
    f"public.vehicle_totals('{HOUR}', 'infinity')",
]


def fill(database: str) -> None:
    for history in ("meter_history", "vehicle_history"):
        ask(database, f"SELECT ensure_history_partitions('{history}', ARRAY['2026-11-20'::date])")
    ask(database, FILL)


def test_what_a_reader_has_made_does_not_change_what_readers_are_told(database: str, logins: dict[str, str]) -> None:
    fill(database)
    # In one transaction, so that now() is the same.
    with psycopg.connect(logins["reader"]) as connection:

        def answers() -> dict[str, list[tuple[object, ...]]]:
            return {question: connection.execute(f"SELECT * FROM {question}").fetchall() for question in QUESTIONS}

        before = answers()
        assert [question for question in QUESTIONS if "(" in question and not before[question]] == []
        connection.execute(DECOYS)
        assert connection.execute("SELECT * FROM vehicle_history").fetchall() == []
        assert answers() == before


def test_what_a_writer_has_made_does_not_lead_the_rollups_astray(database: str, logins: dict[str, str]) -> None:
    fill(database)
    assigned = (
        "INSERT INTO public.charger_assignment VALUES ('VEH-2', 'MTR-2', '[2026-11-20 10:00Z, 2026-11-20 10:10Z)')"
    )
    with psycopg.connect(logins["writer"], autocommit=True) as connection:
        connection.execute(DECOYS)
        connection.execute(assigned)
        connection.execute(f"SELECT public.rollup_advance('{HOUR}'::timestamptz + '1 day')")
        connection.execute("SELECT public.rollup_restart()")
        connection.execute("SELECT public.rollup_refresh('2 days')")
        connection.execute("SELECT public.ensure_history_partitions('public.meter_history', ARRAY['2026-11-22'::date])")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT public.drop_history_before('2026-11-21')")
    assert one(database, "SELECT sum(minutes) FROM charging_quarter_hour") == 60
    assert one(database, "SELECT count(*) FROM rollup_mark") == 0
    ask(logins["retention"], "SELECT drop_history_before('2026-11-21')")
    assert ask(database, "SELECT day::text FROM history_days('-infinity') AS day") == [("2026-11-22",)]


@pytest.mark.parametrize("role", ["writer", "retention", "reader", "stranger"])
def test_nobody_makes_a_trigger_of_a_function_of_the_owner(database: str, logins: dict[str, str], role: str) -> None:
    """On a table of theirs it would use their types, and so their casts, with the rights of the owner."""
    triggers = (
        "SELECT proname FROM pg_proc WHERE prorettype = 'trigger'::regtype AND pronamespace = 'public'::regnamespace"
    )
    functions = [name for (name,) in ask(database, triggers)]
    assert functions
    attack = "CREATE TRIGGER t AFTER INSERT ON bait REFERENCING NEW TABLE AS changed EXECUTE FUNCTION public.{}()"
    with psycopg.connect(logins[role], autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE bait (vehicle_id text, meter_id text, valid tstzrange)")
        for function in functions:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(attack.format(function))


def test_functions_with_the_rights_of_the_owner_look_for_temporary_objects_last(database: str) -> None:
    settings = dict(
        ask(
            database, "SELECT proname, proconfig FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"
        )
    )
    assert len(settings) > 20
    assert [name for name, config in settings.items() if "search_path=public, pg_temp" not in (config or [])] == []


def test_migrate_says_so_where_everybody_may_create_functions(database: str) -> None:
    said: list[str] = []
    migrate(database, said.append)
    assert said == []
    ask(database, "GRANT CREATE ON SCHEMA public TO PUBLIC")
    migrate(database, said.append)
    assert len(said) == 1
    assert said[0].endswith(": REVOKE CREATE ON SCHEMA public FROM PUBLIC")
