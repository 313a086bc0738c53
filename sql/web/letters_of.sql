-- Of the newest so many: somebody may have sent millions.
SELECT reason, count(*) AS letters, max(received_at) AS last_received
FROM (SELECT reason, received_at FROM dead_letter_list WHERE device_id = %(device)s LIMIT %(rows)s) AS letter
GROUP BY reason
ORDER BY letters DESC, reason
