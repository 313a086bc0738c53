-- `named`: of these alone; ids have no commas.
SELECT
    meter_id,
    ts AS timestamp,
    online,
    charging,
    kwh_ac AS kwh_consumed_ac,
    voltage,
    received_at
FROM meter_status AS device
WHERE meter_id > %(after)s
    AND (%(named)s::text IS NULL OR meter_id = ANY (string_to_array(%(named)s, ',')))
    AND (%(online)s::boolean IS NULL OR online = %(online)s)
    AND (%(charging)s::boolean IS NULL OR charging = %(charging)s)
    AND (
        %(silent)s::boolean IS NULL
        OR %(silent)s = EXISTS (SELECT FROM device_silent AS silent WHERE silent.kind = 'meter' AND silent.device_id = device.meter_id)
    )
ORDER BY meter_id
LIMIT %(rows)s
