"""prunet's command line with small shards of caches and pictures, for tests that need several shards."""

from prunet import cli
from prunet.data import encoding as latents
from prunet.data import paths
from prunet.evaluation import extraction
from prunet.sampling import shards

if __name__ == "__main__":
    latents.BLOCK = paths.BLOCK = 3
    shards.SHARD = extraction.SHARD = 30
    cli.main()
