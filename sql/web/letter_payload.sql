SELECT payload FROM dead_letter_list WHERE id = %(id)s LIMIT 1
