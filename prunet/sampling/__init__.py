"""From prompts and seeds to pictures, by stock pipelines: one by one, in shards, or with the whole path from noise."""
