"""The comparison: every defence on the same model, the same queries and the same judge."""
