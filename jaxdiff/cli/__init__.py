"""The command line: parse, call the library, print; the only place that prints."""
