"""Many streams at once through a proxy: opened, held and read by one thread."""
import json
import selectors
import socket
import threading
import urllib.parse


class Streams:
    """`asks`: (token, model) for each stream. They run until `stop`."""

    def __init__(self, base, asks):
        address = urllib.parse.urlsplit(base)
        self.selector = selectors.DefaultSelector()
        self.open = []
        self.answering = set()
        self.stopping = False
        self.news = threading.Condition()
        for number, (token, model) in enumerate(asks):
            body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode()
            stream = socket.create_connection((address.hostname, address.port), timeout=30)
            stream.sendall(b"POST %s/api/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nX-Request-Id: stream-%d\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                           % (address.path.encode(), token.encode(), number, len(body), body))
            stream.setblocking(False)
            self.selector.register(stream, selectors.EVENT_READ)
            self.open.append(stream)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while not self.stopping:
            for key, _ in self.selector.select(0.2):
                try:
                    some = key.fileobj.recv(1 << 16)
                except OSError:
                    some = b""
                if not some:
                    self.selector.unregister(key.fileobj)
                    continue
                with self.news:
                    self.answering.add(key.fileobj)
                    self.news.notify_all()

    def wait(self, count, within_s=60):
        """Until so many answer."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.answering) >= count, within_s), f"only {len(self.answering)} answer"

    def stop(self):
        self.stopping = True
        self.thread.join(10)
        for stream in self.open:
            stream.close()
        self.selector.close()
