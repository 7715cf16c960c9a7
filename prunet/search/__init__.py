"""Plans found for one teacher. In: its weights and a budget. Out: a plan, and the cost and error of each removal."""
