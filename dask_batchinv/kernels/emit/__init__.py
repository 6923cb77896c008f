"""How vector code is written as Python, and compiled: nothing here knows of matrices."""
