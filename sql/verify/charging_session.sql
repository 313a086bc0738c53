-- Charging sessions: readings of a vehicle, one after the other, that name the same meter, none more than 15 minutes
-- after the one before. Readings that name no meter neither belong to a session nor end one. AC is that of the matched
-- minutes; a minute belongs to the session of its first reading.
SELECT
    vehicle_id,
    meter_id,
    min(ts) AS started,
    max(ts) AS ended,
    count(*) AS readings,
    sum(kwh_dc) AS dc,
    coalesce(sum(ac), 0) AS ac,
    max(soc) FILTER (WHERE is_first) AS soc_from,
    max(soc) FILTER (WHERE is_last) AS soc_to
FROM (
    SELECT *, count(*) FILTER (WHERE is_first) OVER (PARTITION BY vehicle_id ORDER BY ts) AS session
    FROM (
        SELECT
            vehicle_id,
            meter_id,
            ts,
            kwh_dc,
            soc,
            (lag(meter_id) OVER own IS DISTINCT FROM meter_id OR ts - lag(ts) OVER own > interval '15 minutes') AS is_first,
            (lead(meter_id) OVER own IS DISTINCT FROM meter_id OR lead(ts) OVER own - ts > interval '15 minutes') AS is_last
        FROM vehicle_history
        WHERE meter_id IS NOT NULL
        WINDOW own AS (PARTITION BY vehicle_id ORDER BY ts)
    ) AS marked
) AS numbered
LEFT JOIN (SELECT vehicle_id, meter_id, first_ts AS ts, ac FROM matched_minute) AS matched USING (vehicle_id, meter_id, ts)
GROUP BY vehicle_id, meter_id, session
