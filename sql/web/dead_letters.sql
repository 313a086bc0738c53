SELECT reason, letters, devices, first_received, last_received, example_topic, example_detail
FROM dead_letter_summary
