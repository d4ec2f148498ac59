"""When to stop: what random labels prove about a model."""
