SELECT
    found.vehicle_id,
    %(hours)s::double precision AS time_window_hours,
    %(since)s::timestamptz AS since,
    %(until)s::timestamptz AS until,
    found.kwh_ac AS total_ac_consumed_kwh,
    found.kwh_dc AS total_dc_delivered_kwh,
    found.efficiency AS charging_efficiency,
    found.reason,
    found.loss_kwh,
    found.unattributed_kwh_dc AS unattributed_dc_kwh,
    found.avg_soc AS average_soc,
    found.last_soc,
    found.avg_battery_temp AS average_battery_temp,
    found.max_battery_temp,
    found.matched_minutes,
    found.readings,
    found.meters
FROM vehicle_performance(%(vehicle)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS found
