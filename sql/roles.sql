-- Three group roles with least privilege; give them to login roles: GRANT wattbridge_writer TO bridge_login.
-- Where the migrating role may not create roles, they are left out with a warning: have them created and migrate again.
DO $$
DECLARE
    wanted text;
    -- Functions run with the rights of the owner of the schema, so that readers need none on its tables.
    asking regprocedure[] := ARRAY[
        'charger_performance(text, timestamptz, timestamptz)',
        'charger_sessions(text, timestamptz, timestamptz)',
        'charger_vehicles(text, timestamptz, timestamptz)',
        'charging_sessions(text, timestamptz, timestamptz)',
        'device_quality(text)',
        'efficiency_reason(bigint, boolean, bigint, double precision, double precision, double precision)',
        'energy_by_day(timestamptz, timestamptz, text, text)',
        'energy_by_hour(timestamptz, timestamptz, text, text)',
        'energy_by_quarter_hour(timestamptz, timestamptz, text, text)',
        'finding(double precision, double precision, double precision, double precision)',
        'fleet_charging(timestamptz, timestamptz, boolean)',
        'fleet_chargers(timestamptz, timestamptz)',
        'fleet_faults(timestamptz, timestamptz)',
        'fleet_performance(timestamptz, timestamptz)',
        'fleet_summary(timestamptz, timestamptz)',
        'kwh_left(double precision, double precision)',
        'meter_quarters(text, timestamptz, timestamptz)',
        'meter_totals(timestamptz, timestamptz)',
        'vehicle_efficiency_by_hour(text, timestamptz, timestamptz)',
        'vehicle_performance(text, timestamptz, timestamptz)',
        'vehicle_quarters(text, timestamptz, timestamptz)',
        'vehicle_totals(timestamptz, timestamptz)'
    ];
    writing regprocedure[] := ARRAY[
        'ensure_history_partitions(regclass, date[])',
        'rollup_advance(timestamptz)',
        'rollup_refresh(interval, integer)',
        'rollup_restart(timestamptz)'
    ];
    -- Of trigger functions as well: whoever may execute one can hang it on a table of their own, with types and casts of
    -- their own, which it would then use with the rights of the owner.
    inner_ones regprocedure[] := ARRAY[
        'drop_history_before(date)',
        'charging_between(timestamptz, timestamptz)',
        'charging_of(text[], timestamptz[], timestamptz[])',
        'ensure_partition(regclass, text, timestamptz, timestamptz)',
        'ensure_rollup_partitions(timestamptz, timestamptz)',
        'fleet_runs(timestamptz, timestamptz)',
        'history_days(timestamptz)',
        'loses(double precision, double precision, double precision, double precision)',
        'mark_reassigned()',
        'marked(text, text)',
        'marked_vehicles(tstzrange)',
        'meter_runs(text, timestamptz, timestamptz)',
        'meter_quarters_between(timestamptz, timestamptz)',
        'meter_quarters_of(text[], timestamptz[], timestamptz[])',
        'meter_vehicles(text, timestamptz, timestamptz)',
        'new_devices(text, timestamptz)',
        'restart_rollups()',
        'rolled_up(timestamptz, timestamptz)',
        'rollup_two_hours(timestamptz, timestamptz, text[])',
        'rollup_marks(integer, timestamptz, timestamptz)',
        'vehicle_quarters_between(timestamptz, timestamptz)',
        'vehicle_quarters_of(text[], timestamptz[], timestamptz[])',
        'vehicle_runs(text, timestamptz, timestamptz)',
        'whole_quarter_hours(tstzrange)'
    ];
    routine regprocedure;
BEGIN
    FOREACH routine IN ARRAY asking || writing || inner_ones LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', routine);
    END LOOP;
    -- So it was in new databases before PostgreSQL 15. A function of theirs, with a closer match of types, would be called by
    -- ours with the rights of the owner. Not revoked here: others may use the schema too.
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE WARNING 'everybody may create objects in schema %, and so act as its owner: REVOKE CREATE ON SCHEMA % FROM PUBLIC',
            quote_ident(current_schema()), quote_ident(current_schema());
    END IF;

    FOREACH wanted IN ARRAY ARRAY['wattbridge_writer', 'wattbridge_retention', 'wattbridge_reader'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        EXCEPTION
            -- Roles are shared by all databases of the server: another migration may have just made it.
            WHEN duplicate_object OR unique_violation THEN NULL;
            WHEN insufficient_privilege THEN
                RAISE WARNING 'role % does not exist and % may not create it: create it and run "wattbridge migrate" again',
                    wanted, current_user;
        END;
    END LOOP;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'wattbridge_writer') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO wattbridge_writer', current_schema());
        GRANT SELECT, INSERT ON meter_history, vehicle_history TO wattbridge_writer;
        -- As it once was.
        REVOKE ALL ON FUNCTION drop_history_before(date) FROM wattbridge_writer;
        GRANT SELECT, INSERT, UPDATE ON meter_live, vehicle_live, device_presence, device_duplicate, ingest_counter TO wattbridge_writer;
        GRANT SELECT, INSERT, DELETE ON dead_letter TO wattbridge_writer;
        GRANT SELECT, INSERT, UPDATE, DELETE ON charger_assignment TO wattbridge_writer;
        GRANT SELECT, INSERT ON rollup_mark TO wattbridge_writer;
        GRANT SELECT ON analytics_setting, rollup_progress, schema_migration, vehicle_reading TO wattbridge_writer;
        FOREACH routine IN ARRAY writing LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO wattbridge_writer', routine);
        END LOOP;
    END IF;

    -- Apart from the writer: only a daemon with maintenance.history_days has to drop history.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'wattbridge_retention') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO wattbridge_retention', current_schema());
        GRANT EXECUTE ON FUNCTION drop_history_before(date) TO wattbridge_retention;
    END IF;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'wattbridge_reader') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO wattbridge_reader', current_schema());
        GRANT SELECT ON
            charger_performance_24h, charging_session, closed_24h, data_quality, dead_letter_list, dead_letter_summary, device_silent,
            fleet_inefficient, fleet_now, fleet_summary_24h, ingest_status, meter_reading, meter_status, vehicle_performance_24h,
            vehicle_reading, vehicle_status
        TO wattbridge_reader;
        FOREACH routine IN ARRAY asking LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO wattbridge_reader', routine);
        END LOOP;
    END IF;
END
$$;
