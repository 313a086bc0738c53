-- The last 24 hours of closed quarter hours: a ranking that stands still for a quarter hour, and is quick.
CREATE OR REPLACE VIEW closed_24h AS
SELECT
    date_bin('15 minutes', now() - setting.late_after, 'epoch') - interval '24 hours' AS since,
    date_bin('15 minutes', now() - setting.late_after, 'epoch') AS until,
    date_bin('15 minutes', now() - setting.late_after, 'epoch') + interval '15 minutes' + setting.late_after AS moves_at
FROM analytics_setting AS setting;

COMMENT ON VIEW closed_24h IS 'The window of the fleet views: 24 hours up to the newest quarter hour that ended analytics_setting.late_after ago.';
COMMENT ON COLUMN closed_24h.since IS 'Start of the window.';
COMMENT ON COLUMN closed_24h.until IS 'End of the window, not included.';
COMMENT ON COLUMN closed_24h.moves_at IS 'When the window will have moved on by a quarter hour.';

CREATE OR REPLACE VIEW fleet_inefficient AS
WITH part AS MATERIALIZED (
    SELECT part.*, closed.since, closed.until
    FROM closed_24h AS closed
    CROSS JOIN LATERAL fleet_charging(closed.since, closed.until, charged_only => true) AS part
),
charged AS (
    SELECT
        whole.*,
        finding(
            whole.ac, whole.dc, setting.inefficient_below, greatest(setting.inefficient_least_kwh, setting.efficiency_least_kwh)
        ) AS finding
    FROM (
        SELECT part.vehicle_id, sum(part.matched_ac) AS ac, sum(part.matched_dc) AS dc
        FROM part
        GROUP BY part.vehicle_id
    ) AS whole
    CROSS JOIN analytics_setting AS setting
)
-- Meters are collected for those that are found alone, and not for the whole fleet.
SELECT
    charged.vehicle_id,
    charged.finding,
    CASE WHEN charged.dc <= charged.ac THEN charged.dc / charged.ac END AS efficiency,
    charged.dc / charged.ac AS ratio,
    charged.ac AS kwh_ac,
    charged.dc AS kwh_dc,
    CASE WHEN charged.dc <= charged.ac THEN charged.ac - charged.dc END AS loss_kwh,
    array_agg(part.meter_id ORDER BY part.meter_id) AS meters,
    part.since,
    part.until
FROM charged
JOIN part USING (vehicle_id)
WHERE charged.finding IS NOT NULL
GROUP BY charged.vehicle_id, charged.finding, charged.ac, charged.dc, part.since, part.until
ORDER BY charged.dc > charged.ac, abs(1 - charged.dc / charged.ac) DESC, charged.vehicle_id;

COMMENT ON VIEW fleet_inefficient IS
    'Vehicles that lost too much in 24 hours of closed quarter hours, worst first; a faulty charger shows by recurring in meters. After them those with more DC than AC.';
COMMENT ON COLUMN fleet_inefficient.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN fleet_inefficient.finding IS
    'inefficient: efficiency below analytics_setting.inefficient_below. mapping or metering fault: more DC than AC, so one of them is not what it seems.';
COMMENT ON COLUMN fleet_inefficient.efficiency IS 'kwh_dc / kwh_ac; NULL above 1.';
COMMENT ON COLUMN fleet_inefficient.ratio IS 'kwh_dc / kwh_ac, whatever it is.';
COMMENT ON COLUMN fleet_inefficient.kwh_ac IS 'AC energy of the matched minutes, in kWh; at least analytics_setting.inefficient_least_kwh.';
COMMENT ON COLUMN fleet_inefficient.kwh_dc IS 'DC energy of the matched minutes, in kWh.';
COMMENT ON COLUMN fleet_inefficient.loss_kwh IS 'kwh_ac - kwh_dc; NULL with the efficiency.';
COMMENT ON COLUMN fleet_inefficient.meters IS 'The meters where it charged in matched minutes.';
COMMENT ON COLUMN fleet_inefficient.since IS 'Start of the window.';
COMMENT ON COLUMN fleet_inefficient.until IS 'End of the window, not included.';

CREATE OR REPLACE VIEW charger_performance_24h AS
SELECT charger.*, closed.since, closed.until
FROM closed_24h AS closed
CROSS JOIN LATERAL fleet_chargers(closed.since, closed.until) AS charger;

COMMENT ON VIEW charger_performance_24h IS 'How efficiently vehicles charged at each meter, in 24 hours of closed quarter hours. Other windows: fleet_chargers().';
COMMENT ON COLUMN charger_performance_24h.meter_id IS 'The meter.';
COMMENT ON COLUMN charger_performance_24h.readings IS 'Its readings in the window.';
COMMENT ON COLUMN charger_performance_24h.matched_minutes IS 'Minutes in which one vehicle alone reported from it, and it reported too.';
COMMENT ON COLUMN charger_performance_24h.kwh_ac IS 'AC energy of the matched minutes, by the meter, in kWh.';
COMMENT ON COLUMN charger_performance_24h.kwh_dc IS 'DC energy of the matched minutes, by the vehicles, in kWh.';
COMMENT ON COLUMN charger_performance_24h.efficiency IS 'kwh_dc / kwh_ac; NULL where it means nothing, see reason.';
COMMENT ON COLUMN charger_performance_24h.loss_kwh IS 'kwh_ac - kwh_dc; NULL with the efficiency.';
COMMENT ON COLUMN charger_performance_24h.reason IS 'Why there is no efficiency: no readings, no vehicle known, no matched minute, too little energy, more DC than AC.';
COMMENT ON COLUMN charger_performance_24h.finding IS 'inefficient: failing hardware. mapping or metering fault: more DC than AC. NULL: nothing, or too little energy to tell.';
COMMENT ON COLUMN charger_performance_24h.unattributed_kwh_ac IS 'AC energy outside of matched minutes, in kWh.';
COMMENT ON COLUMN charger_performance_24h.vehicles IS 'The vehicles that were plugged in.';
COMMENT ON COLUMN charger_performance_24h.since IS 'Start of the window.';
COMMENT ON COLUMN charger_performance_24h.until IS 'End of the window, not included.';

CREATE OR REPLACE VIEW fleet_summary_24h AS
SELECT
    closed.since,
    closed.until,
    fleet.meters_reporting,
    fleet.vehicles_reporting,
    fleet.kwh_ac,
    fleet.kwh_dc,
    fleet.loss_kwh,
    fleet.efficiency,
    fleet.reason,
    fleet.unattributed_kwh_ac,
    fleet.unattributed_kwh_dc
FROM closed_24h AS closed
CROSS JOIN LATERAL fleet_summary(closed.since, closed.until) AS fleet;

COMMENT ON VIEW fleet_summary_24h IS 'The whole fleet in 24 hours of closed quarter hours, one row. Totals need no mapping of vehicles to meters. Other windows: fleet_summary().';
COMMENT ON COLUMN fleet_summary_24h.since IS 'Start of the window.';
COMMENT ON COLUMN fleet_summary_24h.until IS 'End of the window, not included.';
COMMENT ON COLUMN fleet_summary_24h.meters_reporting IS 'Meters with readings in the window.';
COMMENT ON COLUMN fleet_summary_24h.vehicles_reporting IS 'Vehicles with readings in the window.';
COMMENT ON COLUMN fleet_summary_24h.kwh_ac IS 'AC energy of all meters, in kWh.';
COMMENT ON COLUMN fleet_summary_24h.kwh_dc IS 'DC energy of all vehicles, in kWh.';
COMMENT ON COLUMN fleet_summary_24h.loss_kwh IS 'kwh_ac - kwh_dc: what was paid for and did not reach a battery of the fleet; NULL with the efficiency.';
COMMENT ON COLUMN fleet_summary_24h.efficiency IS 'kwh_dc / kwh_ac; NULL where it means nothing, see reason.';
COMMENT ON COLUMN fleet_summary_24h.reason IS 'Why there is no efficiency: no readings, too little energy, more DC than AC.';
COMMENT ON COLUMN fleet_summary_24h.unattributed_kwh_ac IS 'AC energy outside of matched minutes, in kWh: of nobody in particular.';
COMMENT ON COLUMN fleet_summary_24h.unattributed_kwh_dc IS 'DC energy outside of matched minutes, in kWh.';
