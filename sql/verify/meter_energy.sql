-- Each meter: all its AC energy, and the part that is some vehicle's.
SELECT
    meter_id,
    readings,
    ac,
    coalesce(minutes, 0) AS minutes,
    coalesce(matched_ac, 0) AS matched_ac
FROM (
    SELECT meter_id, count(*) AS readings, sum(kwh_ac) AS ac
    FROM meter_history
    GROUP BY meter_id
) AS total
LEFT JOIN (
    SELECT meter_id, count(*) AS minutes, sum(ac) AS matched_ac
    FROM matched_minute
    GROUP BY meter_id
) AS matched USING (meter_id)
