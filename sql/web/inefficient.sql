-- By what the view sorts by, so that a page can begin after any row of the one before.
SELECT
    vehicle_id,
    finding,
    efficiency AS charging_efficiency,
    ratio,
    kwh_ac AS total_ac_consumed_kwh,
    kwh_dc AS total_dc_delivered_kwh,
    loss_kwh,
    meters,
    since,
    until
FROM fleet_inefficient
WHERE %(after_ratio)s::double precision IS NULL
    OR (ratio >= 1, -abs(1 - ratio), vehicle_id)
        > (%(after_ratio)s::double precision >= 1, -abs(1 - %(after_ratio)s::double precision), %(after_vehicle)s)
ORDER BY ratio >= 1, -abs(1 - ratio), vehicle_id
LIMIT %(rows)s
