SELECT
    meters, meters_silent, meters_drawing, kw_ac,
    vehicles, vehicles_silent, vehicles_charging, kw_dc,
    newest_received_at, median_delay_s, p95_delay_s
FROM fleet_now
