-- Each vehicle, by the schema's own analytics.
SELECT
    vehicle_id,
    readings,
    kwh_dc + unattributed_kwh_dc AS dc,
    matched_minutes AS minutes,
    kwh_ac AS matched_ac,
    kwh_dc AS matched_dc,
    efficiency
FROM fleet_performance('-infinity')
