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
FROM vehicle_status AS device
WHERE vehicle_id > %(after)s
    AND (%(online)s::boolean IS NULL OR online = %(online)s)
    AND (%(charging)s::boolean IS NULL OR charging = %(charging)s)
    AND (
        %(silent)s::boolean IS NULL
        OR %(silent)s = EXISTS (SELECT FROM device_silent AS silent WHERE silent.kind = 'vehicle' AND silent.device_id = device.vehicle_id)
    )
ORDER BY vehicle_id
LIMIT %(rows)s
