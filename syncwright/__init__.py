"""Write the training step for one device; choose per variable how it is kept in sync on many."""
