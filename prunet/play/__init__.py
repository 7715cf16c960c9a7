"""One page in a browser: models side by side, drawn from equal prompts and noise."""
