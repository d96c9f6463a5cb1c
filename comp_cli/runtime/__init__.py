"""The file that ships beside compact checkpoints."""
