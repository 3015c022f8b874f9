"""The command line: verbs only, one file a group."""
