SELECT since, until, readings, expected_readings, gaps, missing_share, late_share, clock_skew, duplicates, conflicts
FROM device_quality(%(device)s)
WHERE kind = %(kind)s
