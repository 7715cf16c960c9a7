"""Pages, charts and tables for people, made from the files of a run."""
