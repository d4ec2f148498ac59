"""Files and their rows: users' tables, the pool, the ledger, the outputs of stages."""
