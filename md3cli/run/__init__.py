"""One run in one process: rows in, records in input order out, and a journal that outlives a kill."""
