"""Pictures from prompts and seeds, by stock pipelines: one by one, in shards, or with the whole path from noise."""
