"""What a person or a schedule starts: configuration, the command line, one file per flow."""
