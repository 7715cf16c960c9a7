"""prunet's command line with caches of small shards, for tests that need several of them."""

from prunet import cli
from prunet.data import encoding as latents

if __name__ == "__main__":
    latents.SHARD = 3
    cli.main()
