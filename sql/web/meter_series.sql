-- From the rollups and the open tail: quick for months, and it outlives history that was dropped. They have no voltage.
SELECT
    extract(epoch FROM date_bin(make_interval(secs => %(step_s)s), quarter.quarter_hour, 'epoch'))::double precision AS starts,
    sum(quarter.kwh_ac) * 3600 / %(step_s)s AS kw
FROM meter_quarters(%(device)s, %(since)s, %(until)s) AS quarter
GROUP BY starts
ORDER BY starts
