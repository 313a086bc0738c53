-- Only the one that was asked for is computed. A page begins with the bucket after the last one, which is computed whole again.
SELECT day, starts, readings_ac, kwh_ac AS ac_consumed_kwh, readings_dc, kwh_dc AS dc_delivered_kwh
FROM (
    SELECT NULL::date AS day, quarter.*
    FROM energy_by_quarter_hour(%(begin)s, coalesce(%(until)s, 'infinity'::timestamptz), %(meter)s, %(vehicle)s) AS quarter
    WHERE %(resolution)s = 'quarter_hour'
    UNION ALL
    SELECT NULL, by_hour.*
    FROM energy_by_hour(%(begin)s, coalesce(%(until)s, 'infinity'::timestamptz), %(meter)s, %(vehicle)s) AS by_hour
    WHERE %(resolution)s = 'hour'
    UNION ALL
    SELECT by_day.*
    FROM energy_by_day(%(begin)s, coalesce(%(until)s, 'infinity'::timestamptz), %(meter)s, %(vehicle)s) AS by_day
    WHERE %(resolution)s = 'day'
) AS bucket
WHERE %(after)s::timestamptz IS NULL OR starts > %(after)s
ORDER BY starts
LIMIT %(rows)s
