-- Vehicles whose newest reading names this meter.
SELECT vehicle_id FROM vehicle_status WHERE meter_id = %(device)s ORDER BY vehicle_id LIMIT %(rows)s
