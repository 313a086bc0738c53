-- Charging sessions of all vehicles, by the schema's own analytics.
SELECT
    vehicle_id,
    meter_id,
    started,
    ended,
    readings,
    kwh_dc AS dc,
    kwh_ac AS ac,
    soc_from,
    soc_to
FROM charging_sessions(NULL)
