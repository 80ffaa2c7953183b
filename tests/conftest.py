"""The tests start from a terminal's signals, also where they run under nohup or in the background of a script."""

import signal

for number in (signal.SIGHUP, signal.SIGINT):  # ignored there, and whoever inherits that ignores them too
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
