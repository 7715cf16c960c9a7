"""Runs of a recipe from plan to report, in steps that resume; comparisons of variants; estimates of time and memory."""
