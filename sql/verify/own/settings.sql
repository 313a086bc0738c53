-- What the answers depend on beside the readings.
SELECT
    setting.efficiency_least_kwh,
    setting.session_gap,
    setting.vehicle_prefix IS NOT NULL AS naming_rule,
    EXISTS (SELECT FROM charger_assignment) AS assignments
FROM analytics_setting AS setting
