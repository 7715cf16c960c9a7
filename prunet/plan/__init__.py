"""The plan as a value. From its patterns and a config follow the student's config, weight map, pairs and sizes."""
