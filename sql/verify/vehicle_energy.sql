-- Each vehicle: all its DC energy, and over its matched minutes AC, DC and efficiency. NULL where there was no AC energy.
SELECT
    vehicle_id,
    readings,
    dc,
    coalesce(minutes, 0) AS minutes,
    coalesce(matched_ac, 0) AS matched_ac,
    coalesce(matched_dc, 0) AS matched_dc,
    matched_dc / nullif(matched_ac, 0) AS efficiency
FROM (
    SELECT vehicle_id, count(*) AS readings, sum(kwh_dc) AS dc
    FROM vehicle_history
    GROUP BY vehicle_id
) AS total
LEFT JOIN (
    SELECT vehicle_id, count(*) AS minutes, sum(ac) AS matched_ac, sum(dc) AS matched_dc
    FROM matched_minute
    GROUP BY vehicle_id
) AS matched USING (vehicle_id)
