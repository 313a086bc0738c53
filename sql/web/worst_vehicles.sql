-- By what they lose, as worst_chargers.sql.
SELECT
    vehicle_id,
    finding,
    ratio,
    kwh_ac,
    loss_kwh,
    meters,
    count(*) OVER () AS found
FROM fleet_inefficient
ORDER BY loss_kwh DESC NULLS LAST, vehicle_id
LIMIT %(rows)s
