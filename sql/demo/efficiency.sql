-- Efficiency by vehicle over the matched minutes since %(since)s, the worst first; the fleet's totals stand in each row.
-- A matched minute: exactly one vehicle reported from the meter, and the meter drew energy. Vehicles with less than
-- %(enough)s kWh AC come last, whatever their ratio.
WITH at_meter AS (
    SELECT
        vehicle_id,
        meter_id,
        date_bin('1 minute', ts, 'epoch') AS minute,
        sum(kwh_dc) AS dc,
        count(*) OVER (PARTITION BY meter_id, date_bin('1 minute', ts, 'epoch')) AS vehicles
    FROM vehicle_history
    WHERE ts >= %(since)s AND meter_id IS NOT NULL
    GROUP BY vehicle_id, meter_id, minute
),
drawn AS (
    SELECT meter_id, date_bin('1 minute', ts, 'epoch') AS minute, sum(kwh_ac) AS ac
    FROM meter_history
    WHERE ts >= %(since)s AND kwh_ac > 0
    GROUP BY meter_id, minute
),
charged AS (
    SELECT vehicle_id, meter_id, count(*) AS minutes, sum(ac) AS ac, sum(dc) AS dc
    FROM at_meter
    JOIN drawn USING (meter_id, minute)
    WHERE vehicles = 1
    GROUP BY vehicle_id, meter_id
)
SELECT
    vehicle_id,
    meter_id,
    ac,
    dc,
    sum(ac) OVER () AS fleet_ac,
    sum(dc) OVER () AS fleet_dc,
    (sum(minutes) OVER ())::bigint AS fleet_minutes
FROM charged
ORDER BY ac < %(enough)s, dc / ac
LIMIT 5
