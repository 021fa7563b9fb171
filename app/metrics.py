"""What the server has done: figures for Prometheus and a line in the log for each job.

Neither holds prompts, images or addresses: a client is a short hash, whose key lives as long as the process.
"""

from __future__ import annotations

import hashlib
import logging
import secrets

from prometheus_client import Counter, Gauge, Histogram

JOBS = Counter("tavq_jobs", "Jobs by endpoint and outcome.", ["endpoint", "outcome"])
SECONDS = Histogram(
    "tavq_job_seconds",
    "Seconds of computing of each job.",
    ["endpoint"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
WAITED = Histogram(
    "tavq_wait_seconds", "Seconds that each job waited in the queue.", buckets=(0.1, 1, 3, 10, 30, 100, 300)
)
IMAGES = Counter("tavq_images", "Images that were generated.")
QUEUE = Gauge("tavq_queue_length", "Jobs that wait.")
RUNNING = Gauge("tavq_jobs_running", "Jobs that have left the queue and take turns on the model.")

log = logging.getLogger(__name__)
_KEY = secrets.token_bytes(16)


def report(
    endpoint: str, outcome: str, client: str, waited: float, computed: float, reason: str = ""
) -> None:
    """Count a job and log it.

    Args:
        endpoint: its name.
        outcome: done, failed, refused or cancelled.
        client: who asked; only a hash of it is written.
        waited: seconds in the queue.
        computed: seconds on the model.
        reason: why it was not done.
    """
    JOBS.labels(endpoint, outcome).inc()
    if outcome != "refused":
        SECONDS.labels(endpoint).observe(computed)
        WAITED.observe(waited)
    fields = {
        "endpoint": endpoint,
        "outcome": outcome,
        "client": hashlib.blake2b(client.encode(), key=_KEY, digest_size=4).hexdigest(),
        "waited_seconds": round(waited, 2),
        "computed_seconds": round(computed, 2),
    }
    log.info("job", extra={"fields": fields | ({"reason": reason} if reason else {})})
