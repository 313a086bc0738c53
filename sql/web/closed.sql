-- Also what is asked to see whether the database answers, and answers us.
SELECT since, until, extract(epoch FROM moves_at - now())::double precision AS stands_for FROM closed_24h
