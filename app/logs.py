"""The server's log on standard error: plain lines, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

OTHERS = ("uvicorn", "uvicorn.error", "uvicorn.access")  # which write to handlers of their own


class PlainFormatter(logging.Formatter):
    """`12:00:01 job endpoint=generate outcome=done ...`"""

    def format(self, record: logging.LogRecord) -> str:
        words = [time.strftime("%H:%M:%S", time.localtime(record.created)), record.getMessage()]
        words += [f"{name}={value}" for name, value in fields_of(record).items()]
        text = " ".join(words)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object with time, level, logger, event and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


def configure(*, as_json: bool) -> None:
    """Send the logs of this package and of the server's libraries to standard error, in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    logging.root.handlers = [handler]
    logging.getLogger("tavq").setLevel(logging.INFO)
    if as_json:
        logging.captureWarnings(True)


def adopt_libraries() -> None:
    """Let the libraries' loggers use our handler; call it after the server has configured them."""
    for name in OTHERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
