"""Pictures with captions, or prompts: in go folders, shards and tables, out comes a cache of latents and conditions."""
