-- Of the schema that history is in: how many of its own analytics are there, and whether we may ask them.
SELECT
    count(routine.oid) AS functions,
    coalesce(bool_and(has_function_privilege(routine.oid, 'EXECUTE')), false)
        AND has_table_privilege(to_regclass('analytics_setting'), 'SELECT')
        AND has_table_privilege(to_regclass('charger_assignment'), 'SELECT') AS allowed
FROM unnest(ARRAY[
    'fleet_performance(timestamptz, timestamptz)',
    'fleet_chargers(timestamptz, timestamptz)',
    'charging_sessions(text, timestamptz, timestamptz)'
]) AS wanted (signature)
LEFT JOIN pg_proc AS routine
    ON routine.oid = to_regprocedure(wanted.signature)
    AND routine.pronamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('vehicle_history'))
