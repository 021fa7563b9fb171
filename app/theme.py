"""How the page looks: Gradio's theme, and CSS beside it."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Soft(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif")
)
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto}
.pixels img {
  image-rendering: pixelated; object-fit: contain !important; width: 100% !important; height: 100% !important;
}
"""
