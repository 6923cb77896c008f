"""Where a job writes: the only room that changes a target."""
