-- By what they lose, which is what a repair is worth; after them those with more DC than AC.
SELECT
    meter_id,
    finding,
    kwh_ac,
    kwh_dc / kwh_ac AS ratio,
    loss_kwh,
    vehicles,
    count(*) OVER () AS found
FROM fleet_chargers(%(since)s, %(until)s)
WHERE finding IS NOT NULL
ORDER BY loss_kwh DESC NULLS LAST, meter_id
LIMIT %(rows)s
