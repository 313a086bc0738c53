-- Efficiency by vehicle over the matched minutes since %(since)s, the worst first; the fleet's totals stand in each row.
-- Vehicles with less than %(enough)s kWh AC come last, whatever their ratio.
SELECT
    vehicle_id,
    meter_id,
    matched_ac,
    matched_dc,
    sum(matched_ac) OVER () AS fleet_ac,
    sum(matched_dc) OVER () AS fleet_dc,
    (sum(minutes) OVER ())::bigint AS fleet_minutes
FROM fleet_charging(%(since)s, 'infinity')
WHERE minutes > 0
ORDER BY matched_ac < %(enough)s, matched_dc / nullif(matched_ac, 0)
LIMIT 5
