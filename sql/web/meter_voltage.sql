SELECT
    extract(epoch FROM date_bin(make_interval(secs => %(step_s)s), ts, 'epoch'))::double precision AS starts,
    avg(voltage) AS voltage
FROM meter_reading
WHERE meter_id = %(device)s AND ts >= %(since)s AND ts < %(until)s
GROUP BY starts
ORDER BY starts
