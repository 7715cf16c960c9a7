"""The decision as a value: in go patterns and a config, out come the student's config, weight map, pairs and sizes."""
