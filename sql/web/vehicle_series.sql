-- From the rollups and the open tail: quick for months, and it outlives history that was dropped.
SELECT
    extract(epoch FROM date_bin(make_interval(secs => %(step_s)s), quarter.quarter_hour, 'epoch'))::double precision AS starts,
    sum(quarter.kwh_dc) * 3600 / %(step_s)s AS kw,
    sum(quarter.soc_sum) / sum(quarter.readings) AS soc,
    sum(quarter.temp_sum) / sum(quarter.readings) AS battery_temp
FROM vehicle_quarters(%(device)s, %(since)s, %(until)s) AS quarter
GROUP BY starts
ORDER BY starts
