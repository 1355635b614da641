"""Running a model without side effects, its modules and inputs; nothing here is specific to pruning."""
