"""A web server as archives have them: it lists nothing."""

import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def silent_server(folder):
    """Serve a folder; yield the URL, and the paths that are asked about without being read."""
    asked = []

    class Silent(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def do_HEAD(self):
            asked.append(self.path)
            super().do_HEAD()

        def list_directory(self, path):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
