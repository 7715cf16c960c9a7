"""Runs a recipe from plan to report, in resumable steps; compares variants of it; estimates what it would cost."""
