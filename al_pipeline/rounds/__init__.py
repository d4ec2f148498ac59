"""Pure functions about rounds: the next step from the facts, the effect of interventions, records and plans."""
