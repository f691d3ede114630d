#!/usr/bin/env python3
"""watchers.py NUMBER HOST:PORT PATH: so many readers of an event stream, in one process, until it is stopped.

Real watchers sit on other machines. These share a core with the load and the backend, so they are made cheap: they look ten times
a second and throw away what came, in the kernel and uncopied (MSG_TRUNC), and none sleeps in a read that each write would wake.
Prints a line once all of them hear something, and the bytes of all at the end.
"""
import signal
import socket
import sys
import time

GULP = 4 << 20


def main(number, address, path):
    host, port = address.rsplit(":", 1)
    watching = []
    for _ in range(int(number)):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, GULP)  # a look's worth stays in the kernel
        connection.connect((host, int(port)))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        if not connection.recv(4096).startswith(b"HTTP/1.1 200"):
            sys.exit("the feed does not answer with 200")
        connection.setblocking(False)
        watching.append(connection)
    print("watching by", number, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: (print(seen, flush=True), sys.exit()))
    seen, untouched = 0, bytearray(GULP)
    while True:
        time.sleep(0.1)
        for connection in watching:
            try:
                taken = connection.recv_into(untouched, GULP, socket.MSG_TRUNC)
            except BlockingIOError:
                continue
            if taken == 0:
                sys.exit("the feed ended")
            seen += taken


if __name__ == "__main__":
    main(*sys.argv[1:])
