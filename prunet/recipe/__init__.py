"""The recipe, one YAML page, as values: teacher, plan, data, stages and evaluation."""
