"""The documentation: every page is listed, every key and option is described, every command is one that exists."""
