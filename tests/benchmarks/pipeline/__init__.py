"""Times whole jobs, from store to store, against a bare loop that does the same and against what others would write."""
