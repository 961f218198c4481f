"""Whether this process is shutting down, for threads that wait for something outside it."""

import threading

SHUTDOWN_REQUESTED = threading.Event()  # set by SIGINT or SIGTERM, and when a command has returned
