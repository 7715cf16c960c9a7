"""Pages, charts and tables: in go the files of a run, out comes what people look at."""
