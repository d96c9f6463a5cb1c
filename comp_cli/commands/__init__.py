"""What each command does: options in, a report out."""
