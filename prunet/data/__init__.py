"""Pictures with captions, or prompts. In: folders, shards and tables. Out: a cache of latents and conditions."""
