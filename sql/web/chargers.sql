SELECT
    charger.meter_id,
    charger.finding,
    charger.efficiency AS charging_efficiency,
    charger.reason,
    charger.kwh_ac AS total_ac_consumed_kwh,
    charger.kwh_dc AS total_dc_delivered_kwh,
    charger.loss_kwh,
    charger.unattributed_kwh_ac AS unattributed_ac_kwh,
    charger.matched_minutes,
    charger.readings,
    charger.vehicles,
    %(since)s::timestamptz AS since,
    %(until)s::timestamptz AS until
FROM fleet_chargers(%(since)s, %(until)s) AS charger
WHERE charger.meter_id > %(after)s AND (%(finding)s::text IS NULL OR charger.finding = %(finding)s)
ORDER BY charger.meter_id
LIMIT %(rows)s
