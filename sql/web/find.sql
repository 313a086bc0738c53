-- Ids that begin so: vehicles first.
SELECT kind, device_id
FROM (
    SELECT 1 AS place, 'vehicle' AS kind, vehicle_id AS device_id FROM vehicle_status WHERE starts_with(vehicle_id, %(id)s)
    UNION ALL
    SELECT 2, 'meter', meter_id FROM meter_status WHERE starts_with(meter_id, %(id)s)
) AS device
ORDER BY place, device_id
LIMIT %(rows)s
