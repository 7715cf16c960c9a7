"""Pictures drawn in shards: the same bytes whatever was stopped, and by however many processes."""
