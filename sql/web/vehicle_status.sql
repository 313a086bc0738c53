SELECT
    vehicle_id,
    ts AS timestamp,
    online,
    charging,
    soc,
    kwh_dc AS kwh_delivered_dc,
    battery_temp,
    meter_id,
    received_at
FROM vehicle_status
WHERE vehicle_id = %(device)s
