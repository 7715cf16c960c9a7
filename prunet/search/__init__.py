"""Plans found for one teacher: in go its weights and a budget, out come a plan, and what each removal costs and hurts."""
