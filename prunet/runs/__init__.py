"""A recipe from plan to report, step by step, resumed where it was stopped; in several ways; and what it would cost."""
