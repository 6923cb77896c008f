"""How vector code is written as Python, and compiled; of matrices it knows the arguments of a kernel, no more."""
