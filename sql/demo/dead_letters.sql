-- Dead letters by reason, the most frequent first.
SELECT reason, count(*) FROM dead_letter GROUP BY reason ORDER BY count(*) DESC, reason
