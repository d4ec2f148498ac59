"""What lies on disk, row by row: users' files, the pool, the ledger, what stages write."""
