"""What other systems read over HTTP: a process of its own with the rights of a reader, apart from ingest."""
