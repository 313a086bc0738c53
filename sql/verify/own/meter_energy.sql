-- Each meter, by the schema's own analytics. Without those that have sent nothing, and that a vehicle only named.
SELECT
    meter_id,
    readings,
    kwh_ac + unattributed_kwh_ac AS ac,
    matched_minutes AS minutes,
    kwh_ac AS matched_ac
FROM fleet_chargers('-infinity')
WHERE readings > 0 OR matched_minutes > 0
