SELECT
    meter_id,
    ts AS timestamp,
    online,
    charging,
    kwh_ac AS kwh_consumed_ac,
    voltage,
    received_at
FROM meter_status
WHERE meter_id = %(device)s
