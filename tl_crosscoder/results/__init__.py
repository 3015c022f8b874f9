"""Results: tables that save and load, the one table of measures, and the one renderer."""
