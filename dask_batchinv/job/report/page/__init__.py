"""The report of a target: what its ledger, its records and its numbers tell, as a page, as JSON and in a notebook."""
