"""Any network made invariant or equivariant under symmetries of the square, by running it on transformed images."""
