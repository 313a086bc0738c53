SELECT
    %(hours)s::double precision AS time_window_hours,
    %(since)s::timestamptz AS since,
    %(until)s::timestamptz AS until,
    fleet.meters_reporting,
    fleet.vehicles_reporting,
    fleet.kwh_ac AS total_ac_consumed_kwh,
    fleet.kwh_dc AS total_dc_delivered_kwh,
    fleet.efficiency AS charging_efficiency,
    fleet.reason,
    fleet.loss_kwh,
    fleet.unattributed_kwh_ac AS unattributed_ac_kwh,
    fleet.unattributed_kwh_dc AS unattributed_dc_kwh
FROM fleet_summary(%(since)s, %(until)s) AS fleet
