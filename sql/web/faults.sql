-- The chargers that are to blame first, then those that lose the most; with all vehicles that charged there.
SELECT
    meter_id,
    verdict,
    meter_kwh_ac,
    meter_efficiency,
    meter_loss_kwh,
    vehicle_id,
    kwh_ac,
    efficiency,
    elsewhere_efficiency
FROM (
    SELECT fault.*, dense_rank() OVER (ORDER BY verdict <> 'charger', verdict <> 'vehicle', meter_loss_kwh DESC, meter_id) AS place
    FROM fleet_faults(%(since)s, %(until)s) AS fault
) AS ranked
WHERE place <= %(chargers)s
ORDER BY place, efficiency, vehicle_id
