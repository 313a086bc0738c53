SELECT count(*) AS letters
FROM dead_letter_list
WHERE (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(device)s::text IS NULL OR device_id = %(device)s)
