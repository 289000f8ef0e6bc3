"""What all suites of the bench share: records, models, limits, the one timing harness, tables, plots and options."""
