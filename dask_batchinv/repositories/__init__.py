"""Repositories of Icechunk as places: snapshots, which are read, and branches, which are written commit by commit."""
