"""Everything that knows torch and transformers; both are imported only where weights are run."""
