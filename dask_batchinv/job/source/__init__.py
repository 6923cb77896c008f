"""Where a job reads: nothing here changes anything, and no byte is decoded before its metadata were judged."""
