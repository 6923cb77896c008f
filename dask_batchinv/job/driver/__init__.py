"""What runs in the driver: the cluster, the ledger, the lock, the order of events. It never reads a matrix."""
