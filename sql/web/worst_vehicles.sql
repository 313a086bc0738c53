SELECT
    vehicle_id,
    finding,
    ratio,
    kwh_ac,
    loss_kwh,
    meters,
    count(*) OVER () AS found
FROM fleet_inefficient
ORDER BY ratio >= 1, -abs(1 - ratio), vehicle_id
LIMIT %(rows)s
