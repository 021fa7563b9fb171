# docker build -t tavq . && docker run --rm -p 7860:7860 tavq
FROM python:3.11-slim

# Hugging Face runs Spaces as user 1000.
RUN useradd --create-home --uid 1000 tavq

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1

WORKDIR /build
COPY constraints.txt ./
# PyPI's torch brings several GB of CUDA libraries, which a CPU does not need.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch==$(sed -n 's/^torch==//p' constraints.txt)"

COPY . .
# The weights lie in the package, so the image needs no network when it runs.
RUN pip install --constraint constraints.txt ".[app]" && rm -rf /build/*

USER tavq
WORKDIR /home/tavq
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
CMD ["tavq", "demo", "--host", "0.0.0.0", "--port", "7860", "--log-json"]
