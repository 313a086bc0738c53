-- Minutes in which the AC energy of a meter can be told to be that of one vehicle: exactly one vehicle named the meter
-- (then the least of their ids is the greatest as well), and the meter has readings in that minute too.
SELECT meter_id, minute, vehicle_id, first_ts, ac, dc
FROM (
    SELECT
        meter_id,
        date_bin('1 minute', ts, 'epoch') AS minute,
        min(vehicle_id) AS vehicle_id,
        min(ts) AS first_ts,
        sum(kwh_dc) AS dc
    FROM vehicle_history
    WHERE meter_id IS NOT NULL
    GROUP BY meter_id, minute
    HAVING min(vehicle_id) = max(vehicle_id)
) AS plugged
JOIN (
    SELECT meter_id, date_bin('1 minute', ts, 'epoch') AS minute, sum(kwh_ac) AS ac
    FROM meter_history
    GROUP BY meter_id, minute
) AS metered USING (meter_id, minute)
