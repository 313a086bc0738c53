SELECT
    meter_id, readings, matched_minutes, kwh_ac, kwh_dc, efficiency, reason, finding, loss_kwh, unattributed_kwh_ac, vehicles
FROM charger_performance(%(device)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz))
