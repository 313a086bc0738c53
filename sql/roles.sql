-- Two group roles with least privilege; give them to login roles: GRANT wattbridge_writer TO bridge_login.
-- Where the migrating role may not create roles, they are left out with a warning: have them created and migrate again.
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['wattbridge_writer', 'wattbridge_reader'] LOOP
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
        GRANT SELECT, INSERT, UPDATE ON meter_live, vehicle_live, device_presence, ingest_counter TO wattbridge_writer;
        GRANT SELECT, INSERT, DELETE ON dead_letter TO wattbridge_writer;
        GRANT SELECT ON schema_migration TO wattbridge_writer;
        GRANT EXECUTE ON FUNCTION ensure_history_partitions(regclass, date[]) TO wattbridge_writer;
    END IF;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'wattbridge_reader') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO wattbridge_reader', current_schema());
        GRANT SELECT ON meter_status, vehicle_status, ingest_status TO wattbridge_reader;
    END IF;
END
$$;
