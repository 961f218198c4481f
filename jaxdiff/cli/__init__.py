"""The command line: parse arguments, call the library, print. Nothing else prints."""
