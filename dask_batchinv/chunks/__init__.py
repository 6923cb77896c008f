"""Chunks as they are stored: read straight to where they are wanted, never more than they may have, and sealed."""
