SELECT meter_id, verdict, vehicle_id, kwh_ac, efficiency, elsewhere_kwh_ac, elsewhere_efficiency, meter_kwh_ac, meter_efficiency, meter_loss_kwh
FROM fleet_faults(%(since)s, %(until)s)
