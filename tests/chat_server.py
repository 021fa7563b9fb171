"""A server on the loopback address that speaks the OpenAI chat protocol, and errs and stalls as such do."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

Answer = Callable[[int, str], str]


class ChatServer:
    """Recognises an image by its red level, and answers `answer(level, prompt)`.

    Args:
        answer: see above.
        trouble: level -> what goes wrong at the first requests with this image, one after the other: a status
            code, "stall" (longer than the client waits), "hang up" or "no json".
        delay_s: of each answer.
    """

    def __init__(self, answer: Answer, trouble: dict[int, list[int | str]] | None = None, delay_s: float = 0):
        self.answer = answer
        self.trouble = trouble or {}
        self.delay_s = delay_s
        self.requests: Counter[int] = Counter()
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> ChatServer:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    chat._open += 1
                    chat.most_at_once = max(chat.most_at_once, chat._open)
                chat._respond(self, body)
                with chat._lock:
                    chat._open -= 1

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that were told enough hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        picture, text = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        level = round(Image.open(io.BytesIO(data)).resize((1, 1)).getpixel((0, 0))[0] / 20)
        with self._lock:
            trouble = self.trouble.get(level, [])[self.requests[level] :][:1]
            self.requests[level] += 1
        time.sleep(self.delay_s)
        if trouble == ["stall"]:
            self._closing.wait(20)
        if trouble and trouble[0] in ("stall", "hang up"):
            handler.close_connection = True
            return
        status = trouble[0] if trouble and isinstance(trouble[0], int) else 200
        message = {"role": "assistant", "content": self.answer(level, text["text"])}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        payload = b"<html>busy</html>" if trouble == ["no json"] else json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)
