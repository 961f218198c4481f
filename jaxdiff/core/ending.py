"""Whether this process is about to end, for threads that wait for something outside it."""

import threading

ENDING = threading.Event()  # set by a signal that asks for it, and when a command has returned
