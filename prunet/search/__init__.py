"""Plans found for one teacher: in go its weights and a budget, out come a plan and what removals cost and hurt."""
