"""What runs on workers: it returns data, and touches neither ledger (but to read it), lock nor client."""
